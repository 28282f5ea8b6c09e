//! Experts move by themselves when the text that is served becomes another one.

use crate::common::{Setup, prepare, request, root, tokens};
use exflow::engine::{
    Cluster, ClusterOptions, Engine, EngineOptions, NoProgress, PlacementSource, PlacementTable, Request,
    Schedule, Strategy, TextCodec, TransportKind,
};
use exflow_placement::score_trace;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const RANKS: usize = 4;
/// Tokens after which it is looked whether a move pays.
const EVERY: usize = 1200;

/// Files of a folder with this ending, in order.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let all =
        std::fs::read_dir(root().join(folder)).expect(folder).map(|entry| entry.expect("an entry").path());
    let mut all: Vec<_> = all.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
    all.sort();
    all
}

/// Pieces of `length` tokens of files, in two halves: every other piece is never served.
fn pieces(codec: &TextCodec, files: &[PathBuf], length: usize) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let text = |path: &PathBuf| std::fs::read_to_string(path).expect("text");
    let ids = files.iter().map(|path| codec.encode(&text(path)).expect("ids"));
    let whole = |ids: Vec<u32>| ids.chunks_exact(length).map(<[u32]>::to_vec).collect::<Vec<_>>();
    let pieces: Vec<Vec<u32>> = ids.flat_map(whole).take(80).collect();
    assert!(pieces.len() >= 40, "{} pieces", pieces.len());
    let (served, apart): (Vec<_>, Vec<_>) = pieces.into_iter().enumerate().partition(|(n, _)| n % 2 == 0);
    let ids = |pieces: Vec<(usize, Vec<u32>)>| pieces.into_iter().map(|(_, ids)| ids).collect();
    (ids(served), ids(apart))
}

/// Runs requests, several at a time; returns what they came to.
fn serve(engine: &Engine, requests: &[Request]) -> Vec<Vec<u32>> {
    let mut said = Vec::new();
    for some in requests.chunks(8) {
        let running: Vec<_> = some.iter().map(|r| engine.submit(r.clone()).expect("taken")).collect();
        said.extend(running.into_iter().map(|tokens| tokens.complete().expect("tokens").output_ids));
    }
    said
}

/// Serves the requests over and over until a move is done; returns what they came to the first time.
fn serve_until_moved(engine: &Engine, requests: &[Request], moves: u64) -> Vec<Vec<u32>> {
    let deadline = Instant::now() + Duration::from_secs(240);
    let first = serve(engine, requests);
    while engine.live().moves.done < moves {
        assert!(Instant::now() < deadline, "nothing moved: {:?}", engine.live());
        assert_eq!(serve(engine, requests), first, "the same, whatever moves");
    }
    first
}

fn options(model: &Path) -> ClusterOptions {
    ClusterOptions {
        ranks: RANKS,
        transport: TransportKind::Quic,
        schedule: Schedule::Flow,
        placement: PlacementSource::RoundRobin,
        // Crossings cost something.
        link: Some("latency=1ms".parse().expect("a link")),
        ..ClusterOptions::new(model)
    }
}

#[test]
fn a_table_follows_the_text_that_is_served() {
    prepare();
    let model = root().join("examples/models/gpt-moe-16e");
    let mut one = Setup::one_rank(&model).start();
    let codec = one.text().expect("a tokenizer");
    let (prose, _) = pieces(codec, &files("docs", "md"), 64);
    let (code, unseen) = pieces(codec, &files("transport/src/quic", "rs"), 64);
    let mut routes = |pieces: &[Vec<u32>]| one.profile(pieces, &NoProgress).expect("routes");
    let (served, unseen) = (routes(&code), routes(&unseen));
    let asked = |pieces: &[Vec<u32>]| pieces.iter().map(|ids| request(ids, 6)).collect::<Vec<_>>();
    let (prose, code) = (asked(&prose), asked(&code));
    let expected =
        [&prose, &code].map(|requests| tokens(&one.generate(requests, &mut |_| {}).expect("one rank")));

    let options = options(&model);
    let cluster = Cluster::start(options, &NoProgress).expect("a cluster");
    assert_eq!(cluster.options().strategy, Strategy::Coherent);
    let replace =
        EngineOptions { replace_live: true, replace_every: Some(EVERY), ..EngineOptions::default() };
    let engine = Engine::over(cluster, replace).expect("an engine");
    let begun = engine.placement();

    assert_eq!(serve_until_moved(&engine, &prose, 1), expected[0]);
    let for_prose = engine.placement();
    assert_ne!(for_prose.assignment, begun.assignment);
    let before = engine.live().moves.done;

    assert_eq!(serve_until_moved(&engine, &code, before + 1), expected[1]);
    let for_code = engine.placement();
    let live = engine.live();
    assert_eq!(live.moves.refused, 0, "{:?}", live.moves);
    assert!(live.moves.experts > 0 && live.moves.seconds > 0.0);
    // The table that was made for prose is less at home in code than the one that followed; and what was learnt holds for
    // code that was never served.
    let stays = |table: &PlacementTable| [&served, &unseen].map(|trace| score_trace(table, trace).stay_rate);
    let (round_robin, of_prose, of_code) = (stays(&begun), stays(&for_prose), stays(&for_code));
    let said = format!(
        "stay rate on code that was served, and that was not: {round_robin:.3?} round robin, {of_prose:.3?} the table of \
         prose, {of_code:.3?} the one that followed"
    );
    assert!(of_code[0] > of_prose[0] + 0.01, "{said}");
    assert!(of_code[1] > round_robin[1] + 0.1, "{said}");
    engine.finish();
}

//! The model in `examples/models/gpt-moe-16e`: what its reference says, and that its affinity is real.

mod common;

use common::reference::Reference;
use common::{Setup, generate, request, root, tokens};
use exflow::engine::{
    Feed, NoProgress, PlacementSource, Request, Schedule, Strategy, TextCodec, TransportKind,
};
use exflow_placement::{
    Affinity, ExpertId, LayerId, PlacementTable, Rank, RoutingTrace, SolveOptions, Topology, score_trace,
    solve,
};
use serde::Deserialize;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Leads closer than this may fall either way in float32.
const CLEAR: f64 = 1e-3;

/// `reference.json`: greedy continuations by another implementation.
#[derive(Deserialize)]
struct Stated {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    continuation_ids: Vec<u32>,
    /// The lead of each continued token over the second best.
    top2_margin: Vec<f64>,
    /// `[layer][position]`, of every id but the last.
    experts: Vec<Vec<i32>>,
}

impl Case {
    /// Every id that was fed.
    fn fed(&self) -> Vec<u32> {
        let ids = [&self.prompt_ids[..], &self.continuation_ids].concat();
        ids[..ids.len() - 1].to_vec()
    }

    /// How much of the continuation comes before the first lead that is not clear.
    fn clear(&self) -> usize {
        self.top2_margin.iter().position(|lead| *lead <= CLEAR).unwrap_or(self.top2_margin.len())
    }
}

fn model() -> PathBuf {
    root().join("examples/models/gpt-moe-16e")
}

fn stated() -> Vec<Case> {
    let text = fs::read_to_string(model().join("reference.json")).expect("reference.json");
    let stated: Stated = serde_json::from_str(&text).expect("the form of reference.json");
    assert!(stated.cases.len() >= 3);
    stated.cases
}

#[test]
fn it_continues_as_its_reference_says() {
    let model = model();
    let mut cluster = Setup::one_rank(&model).start();
    let cases = stated();
    let prompts: Vec<_> = cases.iter().map(|c| request(&c.prompt_ids, c.continuation_ids.len())).collect();
    let run = generate(&mut cluster, &prompts);
    let clear: usize = cases.iter().map(Case::clear).sum();
    let all: usize = cases.iter().map(|case| case.continuation_ids.len()).sum();
    assert!(2 * clear > all, "most of the continuations is clear: {clear} of {all}");
    for (case, done) in cases.iter().zip(&run.sequences) {
        let n = case.clear();
        assert_eq!(done.output_ids[..n], case.continuation_ids[..n], "{:?}", case.prompt);
        let codec = cluster.text().expect("a tokenizer");
        assert_eq!(codec.encode(&case.prompt).expect("ids"), case.prompt_ids);
    }
    // Fed the same ids, it agrees at every position, also after a lead that was not clear.
    for case in &cases {
        for feed in [Feed::Prefill, Feed::Decode] {
            let dump = cluster.logits(&case.fed(), feed).expect("logits");
            for (n, (id, lead)) in case.continuation_ids.iter().zip(&case.top2_margin).enumerate() {
                let row = &dump.logits[(case.prompt_ids.len() - 1 + n) * dump.vocab..][..dump.vocab];
                let best = (0..dump.vocab).fold(0, |a, b| if row[b] > row[a] { b } else { a });
                assert!(best as u32 == *id || *lead <= CLEAR, "{:?}, {feed:?}, token {n}", case.prompt);
            }
        }
    }
}

#[test]
fn its_logits_and_routes_match_the_float64_reference() {
    let model = model();
    let reference = Reference::load(&model);
    let mut cluster = Setup::one_rank(&model).start();
    for case in stated() {
        let ids = case.fed();
        let truth = reference.forward(&ids);
        for feed in [Feed::Prefill, Feed::Decode] {
            let dump = cluster.logits(&ids, feed).expect("logits");
            let worst = dump
                .logits
                .iter()
                .zip(truth.logits.iter().flatten())
                .fold(0f64, |worst, (a, b)| worst.max((f64::from(*a) - b).abs()));
            assert!(worst < 2e-4, "{:?}, {feed:?}: a logit is off by {worst:.2e}", case.prompt);
            for (l, (layer, routes)) in dump.layers.iter().zip(&truth.routes).enumerate() {
                for t in 0..ids.len() {
                    if routes.margins[t] > CLEAR {
                        assert_eq!(layer.experts[t], routes.experts[t][0] as i32, "layer {l}, token {t}");
                        assert_eq!(layer.experts[t], case.experts[l][t], "layer {l}, token {t}");
                    }
                }
            }
        }
    }
}

#[test]
fn four_ranks_over_quic_say_what_one_says() {
    let model = model();
    let cases = stated();
    let requests: Vec<_> = cases.iter().map(|case| request(&case.prompt_ids, 20)).collect();
    let alone = tokens(&generate(&mut Setup::one_rank(&model).start(), &requests));
    for strategy in [Strategy::Vanilla, Strategy::Coherent] {
        let setup = Setup { transport: TransportKind::Quic, ..Setup::new(&model, 4, strategy) };
        let run = generate(&mut setup.start(), &requests);
        assert_eq!(tokens(&run), alone, "{strategy:?}");
        let exchanges = if strategy == Strategy::Vanilla { 2.0 } else { 1.0 };
        assert_eq!(run.stats.exchanges_per_layer, exchanges, "{strategy:?}");
    }
}

/// The project's own documents in pieces of a few hundred tokens: every other piece is held out.
fn documents(codec: &TextCodec) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let mut texts = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    let docs = fs::read_dir(root().join("docs")).expect("docs/").map(|entry| entry.expect("an entry").path());
    texts.extend(docs.filter(|path| path.extension().is_some_and(|e| e == "md")));
    texts.sort();
    let pieces: Vec<Vec<u32>> = texts
        .iter()
        .flat_map(|path| {
            let ids = codec.encode(&fs::read_to_string(path).expect("a document")).expect("ids");
            ids.chunks(256).filter(|piece| piece.len() > 32).map(<[u32]>::to_vec).collect::<Vec<_>>()
        })
        .take(48)
        .collect();
    assert!(pieces.len() >= 12, "the documents are long enough to learn from: {} pieces", pieces.len());
    let (mut profiled, mut held_out) = (Vec::new(), Vec::new());
    for (n, piece) in pieces.into_iter().enumerate() {
        if n % 2 == 0 { profiled.push(piece) } else { held_out.push(piece) }
    }
    (profiled, held_out)
}

/// The affinity table of its sixteen experts on four ranks.
fn solved(trace: &RoutingTrace) -> PlacementTable {
    let affinity = Affinity::from_trace(trace, 16).expect("counts");
    let options =
        SolveOptions { time_limit: Duration::from_secs(20), max_rounds: Some(4), ..Default::default() };
    solve(&affinity, &Topology::uniform(4), &options, &mut |_| {}).expect("a table")
}

/// By how much more of the transitions stay with the affinity table, on text that was not profiled.
const GAIN: f64 = 0.10;

#[test]
fn its_affinity_keeps_tokens_where_they_are_on_text_that_was_not_profiled() {
    let model = model();
    let mut one = Setup::one_rank(&model).start();
    let (profiled, held_out) = documents(one.text().expect("a tokenizer"));
    let trace = one.profile(&profiled, &NoProgress).expect("a profile");
    let unseen = one.profile(&held_out, &NoProgress).expect("a profile");
    let (layers, experts) = (trace.layers(), 16);

    // No locality without balance: a collapsed router is local for nothing.
    let table = solved(&trace);
    for layer in &table.assignment {
        for rank in 0..4 {
            assert_eq!(layer.iter().filter(|r| r.index() == rank).count(), experts / 4, "equal shares");
        }
    }
    let round_robin = PlacementTable::round_robin(layers, experts, 4);
    let (placed, dealt) =
        (score_trace(&table, &unseen).stay_rate, score_trace(&round_robin, &unseen).stay_rate);
    assert!(dealt < 0.5, "round robin is no better than chance and skew: {dealt}");
    assert!(placed > dealt + GAIN, "unseen text: {placed:.3} with affinity, {dealt:.3} round robin");

    // And so it runs: the same tokens, fewer crossings.
    let requests: Vec<Request> =
        held_out.iter().take(6).map(|ids| request(&ids[..ids.len().min(48)], 40)).collect();
    let run = |placement: PlacementSource| {
        let setup = Setup { placement, ..Setup::new(&model, 4, Strategy::Coherent) };
        generate(&mut setup.start(), &requests)
    };
    let (affine, plain) = (run(PlacementSource::Table(table)), run(PlacementSource::RoundRobin));
    assert_eq!(tokens(&affine), tokens(&plain));
    let (placed, dealt) = (affine.stats.stay_rate, plain.stats.stay_rate);
    assert!(placed > dealt + GAIN, "while it generates: {placed:.3} with affinity, {dealt:.3} round robin");
    let (placed, dealt) =
        (affine.stats.decode_bytes_per_token.dispatch, plain.stats.decode_bytes_per_token.dispatch);
    assert!(placed < dealt, "rows that stay send no bytes: {placed} < {dealt}");
}

/// Bytes of a row and of a partial, from their form on the wire: ids, position and route, one choice, and 96 floats of
/// residual stream; ids, position, place, and 96 floats.
const ROW_BYTES: usize = 18 + 8 + 4 * 96;
const PARTIAL_BYTES: usize = 10 + 4 * 96;

/// Rows and partials that cross for the decoded tokens of one text, by its routes alone: under vanilla a token lives at
/// `home`, and a row whose expert is elsewhere goes there and its partial comes back; under coherent the token goes along,
/// and its successor begins where it ended.
fn crossings(
    routes: &RoutingTrace,
    decoded: std::ops::Range<usize>,
    table: &PlacementTable,
    strategy: Strategy,
    home: Rank,
) -> (usize, usize) {
    let (mut rows, mut at) = (0, home);
    for token in decoded {
        for layer in 0..routes.layers() {
            let expert = ExpertId::from(routes.chosen(token, layer)[0] as usize);
            let holder = table.holders(LayerId::from(layer), expert).next().expect("a holder");
            rows += usize::from(holder != at);
            if strategy == Strategy::Coherent {
                at = holder;
            }
        }
    }
    (rows, if strategy == Strategy::Vanilla { rows } else { 0 })
}

#[test]
fn it_sends_the_bytes_that_its_routes_say() {
    const MADE: usize = 24;
    let model = model();
    let mut one = Setup::one_rank(&model).start();
    let (profiled, held_out) = documents(one.text().expect("a tokenizer"));
    let affine = solved(&one.profile(&profiled, &NoProgress).expect("a profile"));
    // Of equal lengths, so that rank r is home to texts r and r + 4.
    let requests: Vec<Request> = held_out.iter().take(8).map(|ids| request(&ids[..32], MADE)).collect();
    let texts: Vec<Vec<u32>> = generate(&mut one, &requests)
        .sequences
        .iter()
        .map(|done| [&done.prompt_ids[..], &done.output_ids[..MADE - 1]].concat())
        .collect();
    let mut routes = |text: &Vec<u32>| one.profile(std::slice::from_ref(text), &NoProgress).expect("routes");
    let routes: Vec<RoutingTrace> = texts.iter().map(&mut routes).collect();

    for table in [PlacementTable::round_robin(8, 16, 4), affine] {
        for (strategy, schedule) in [Strategy::Vanilla, Strategy::Coherent]
            .into_iter()
            .flat_map(|strategy| [(strategy, Schedule::Rounds), (strategy, Schedule::Flow)])
        {
            let setup = Setup {
                schedule,
                placement: PlacementSource::Table(table.clone()),
                ..Setup::new(&model, 4, strategy)
            };
            let stats = generate(&mut setup.start(), &requests).stats;
            let of = |(text, routes): (usize, &RoutingTrace)| {
                crossings(routes, 32..32 + MADE - 1, &table, strategy, Rank::from(text % 4))
            };
            let counted = routes.iter().enumerate().map(of);
            let (rows, partials) = counted.fold((0, 0), |(r, p), (rows, partials)| (r + rows, p + partials));
            let tokens = (8 * (MADE - 1)) as f64;
            let sent = &stats.decode_bytes_per_token;
            for (class, sent, counted) in [
                ("dispatch", sent.dispatch, (rows * ROW_BYTES) as f64 / tokens),
                ("combine", sent.combine, (partials * PARTIAL_BYTES) as f64 / tokens),
            ] {
                let what = format!(
                    "{strategy:?} {schedule:?} {class}: {sent:.2} bytes a token, {counted:.2} by the routes"
                );
                // In flow a frame says in two bytes what it is, however many rows are in it.
                let within = if schedule == Schedule::Rounds { 1e-6 } else { 0.01 * counted };
                assert!((sent - counted).abs() <= within, "{what}");
            }
            assert!(rows > 0);
        }
    }
}

#[test]
fn it_is_what_a_demonstration_needs() {
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(model().join("config.json")).expect("config.json")).expect("JSON");
    assert_eq!(config["model_type"], "gpt_moe");
    assert_eq!((&config["num_experts"], &config["top_k"]), (&16.into(), &1.into()));
    assert!(config["n_layer"].as_u64() >= Some(8));
    assert!(config["n_positions"].as_u64() >= Some(512));
    assert!(fs::metadata(model().join("model.safetensors")).expect("weights").len() <= 24_000_000);
    let card = fs::read_to_string(model().join("README.md")).expect("a model card");
    for figure in ["nats", "round-robin", "load", "held-out"] {
        assert!(card.to_lowercase().contains(figure), "the model card says nothing of {figure}");
    }
}

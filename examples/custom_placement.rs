//! A placement made by hand: any rule of your own, checked, run, and held against round-robin.
//! `cargo run --release --example custom_placement`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, Cluster, ClusterOptions, PlacementSource, Rank, Request};
use exflow::placement::{LayerId, PlacementTable, Replica};
use exflow::progress::Bars;
use std::error::Error;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");
const RANKS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    engine::prepare_process(RANKS); // before any thread exists
    let spec = engine::ModelSpec::read(MODEL.as_ref())?;
    let (layers, experts) = (spec.moe_layers(), spec.experts);

    // The rule: rank 0 is the large one and holds half of every layer; the others share the rest. Experts 0 and 1 of
    // the first layer lie on rank 2 as well, so that tokens there need not leave for them.
    let rank_of = |expert: usize| match expert < experts / 2 {
        true => Rank(0),
        false => Rank::from(1 + expert % 2),
    };
    let assignment = (0..layers).map(|_| (0..experts).map(rank_of).collect()).collect();
    let mut table = PlacementTable::from_assignment(assignment, RANKS)?;
    let copy = |expert: usize| Replica { layer: LayerId::from(0), expert: expert.into(), rank: Rank(2) };
    table.set_replicas(vec![copy(0), copy(1)]);
    table.check()?; // what a table must be, named where it is not
    println!("experts per rank, all layers together: {:?}", table.experts_per_rank());

    let mut texts = Vec::new();
    for (name, placement) in
        [("round_robin", PlacementSource::RoundRobin), ("by hand", PlacementSource::Table(table))]
    {
        let mut options = ClusterOptions::new(MODEL);
        options.ranks = RANKS;
        options.placement = placement;
        let mut cluster = Cluster::start(options, &Bars::terminal_only())?;
        let prompt_ids = cluster.text()?.encode("In the beginning")?;
        let request = Request { prompt_ids, max_tokens: 32, ignore_eos: true, ..Request::default() };
        let run = cluster.generate(&[request], &mut |_| {})?;
        let stats = &run.stats;
        println!(
            "{name:<12} stay rate {:5.1} %, work by rank {:?}",
            100.0 * stats.stay_rate,
            stats.expert_load
        );
        texts.extend(run.sequences.into_iter().map(|done| done.text));
    }
    println!("both said the same: {}", texts[0] == texts[1]);
    Ok(())
}

//! What the end-to-end tests share: tiny models made on the spot, a float64 reference, clusters.

#![allow(dead_code, reason = "each test binary uses its own part of this module")]

pub(crate) mod reference;
pub(crate) mod tiny;

use exflow::engine::{
    Cluster, ClusterOptions, Combine, FinishReason, Generation, NoProgress, PlacementSource, Request,
    Schedule, Strategy, TransportKind,
};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// Settles what must be settled before the first device of the process exists.
pub(crate) fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| exflow::engine::prepare_process(4));
}

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// A cluster of this process on a model folder.
pub(crate) struct Setup<'a> {
    pub(crate) model: &'a Path,
    pub(crate) ranks: usize,
    pub(crate) transport: TransportKind,
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) schedule: Schedule,
    pub(crate) placement: PlacementSource,
}

impl<'a> Setup<'a> {
    pub(crate) fn one_rank(model: &'a Path) -> Self {
        Self::new(model, 1, Strategy::Coherent)
    }

    pub(crate) fn new(model: &'a Path, ranks: usize, strategy: Strategy) -> Self {
        Self {
            model,
            ranks,
            transport: TransportKind::Local,
            strategy,
            combine: Combine::Exact,
            schedule: Schedule::Rounds,
            placement: PlacementSource::RoundRobin,
        }
    }

    pub(crate) fn start(&self) -> Cluster {
        prepare();
        let mut options = ClusterOptions::new(self.model);
        options.ranks = self.ranks;
        options.transport = self.transport;
        options.strategy = self.strategy;
        options.combine = self.combine;
        options.schedule = self.schedule;
        options.placement = self.placement.clone();
        Cluster::start(options, &NoProgress)
            .unwrap_or_else(|e| panic!("a cluster of {} ranks: {e}", self.ranks))
    }
}

/// A greedy request that runs to its token limit.
pub(crate) fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request { prompt_ids: prompt.to_vec(), max_tokens, ignore_eos: true, ..Request::default() }
}

/// Runs requests together and checks what holds of every run: the events spell the completions.
pub(crate) fn generate(cluster: &mut Cluster, requests: &[Request]) -> Generation {
    let mut streamed: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
    let mut texts = vec![String::new(); requests.len()];
    let mut finished = vec![None; requests.len()];
    let run = cluster
        .generate(requests, &mut |event| {
            assert!(finished[event.sequence].is_none(), "a token after the end of {}", event.sequence);
            finished[event.sequence] = event.finish;
            streamed[event.sequence].push(event.token);
            texts[event.sequence].push_str(&event.text);
        })
        .unwrap_or_else(|e| panic!("generate: {e}"));
    assert_eq!(run.sequences.len(), requests.len());
    for (s, done) in run.sequences.iter().enumerate() {
        assert_eq!(done.prompt_ids, requests[s].prompt_ids);
        assert_eq!(finished[s], Some(done.finish_reason), "the last event of {s} says why it ended");
        if done.finish_reason == FinishReason::Stop {
            streamed[s].truncate(done.output_ids.len()); // EOS itself may be an event, but is no output
        }
        assert_eq!(streamed[s], done.output_ids, "streamed tokens of sequence {s}");
        assert_eq!(texts[s], done.text, "streamed text of sequence {s}");
    }
    run
}

/// The output ids of every sequence.
pub(crate) fn tokens(run: &Generation) -> Vec<Vec<u32>> {
    run.sequences.iter().map(|s| s.output_ids.clone()).collect()
}

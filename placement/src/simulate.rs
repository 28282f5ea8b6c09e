//! Replays a trace over a table and a topology: what would travel, and how long the exchanges would take.
//!
//! The trace is cut into as many streams as sequences run at once; a step decodes one token of each. Rows follow the
//! route plan that the engine follows, so that counts are those of a run. Times are of the α-β model: an exchange in
//! rounds takes the largest latency between any two ranks, plus what the busiest rank needs to send or to receive,
//!
//!   t = max_gh α_gh + max_g max( Σ_h bytes_gh / β_gh, Σ_h bytes_hg / β_hg )
//!
//! and without rounds (`flow`) a token pays for its own crossings alone. K/V travels beside both and is counted in
//! bytes only; computing is not modelled at all.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::{ExpertId, LayerId, Rank};
use crate::route::{Route, Strategy};
use crate::score::busiest_over_mean;
use crate::table::{PlacementTable, TableError};
use crate::topology::Topology;
use crate::trace::RoutingTrace;

/// What a simulation is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimulateOptions {
    /// Where tokens go after their experts.
    pub strategy: Strategy,
    /// Sequences that decode at once.
    pub batch: usize,
    /// Bytes of a row: hidden size times the size of a number.
    pub row_bytes: f64,
    /// Bytes of K/V that one token makes in one layer.
    pub kv_bytes: f64,
    /// Whether a rank adds its experts' outputs before it sends them (`--combine sum`).
    pub combine_sum: bool,
}

/// Why a trace cannot be replayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SimulateError {
    /// The table is of another shape.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The topology has another number of ranks.
    #[error("the table is for {table} ranks, the topology has {topology}: make them agree")]
    Ranks {
        /// Ranks of the table.
        table: usize,
        /// Ranks of the topology.
        topology: usize,
    },
    /// The trace names an expert that the table does not have.
    #[error(
        "the trace names expert {expert}, the table has {experts} a layer: use a trace of the same model"
    )]
    Expert {
        /// Largest id.
        expert: usize,
        /// E.
        experts: usize,
    },
    /// Too few tokens, or no sequences.
    #[error("{tokens} tokens cannot be cut into {batch} streams: give a longer trace or a smaller --batch")]
    Batch {
        /// Tokens of the trace.
        tokens: usize,
        /// Sequences asked for.
        batch: usize,
    },
}

/// What a replay counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Simulation {
    /// Steps replayed.
    pub steps: usize,
    /// Tokens replayed.
    pub tokens: usize,
    /// Share of layer transitions, the wrap's included, that need no crossing to another rank.
    pub stay_rate: f64,
    /// The same for crossings to another host.
    pub host_stay_rate: f64,
    /// Rows that leave their rank per token, over all layers.
    pub crossings_per_token: f64,
    /// Exchanges per MoE layer and step.
    pub exchanges_per_layer: f64,
    /// Bytes per token: rows to experts.
    pub dispatch_bytes: f64,
    /// Bytes per token: expert outputs.
    pub combine_bytes: f64,
    /// Bytes per token: K/V to the rest of each layer's domain.
    pub kv_bytes: f64,
    /// `[R][R]` bytes from row rank to column rank per token, all classes.
    pub traffic: Vec<Vec<f64>>,
    /// Experts' rows on the busiest rank over the mean, mean over steps and layers.
    pub imbalance: f64,
    /// Time in exchanges per step, in rounds: what every sequence waits for its next token. Where links are known.
    pub rounds_ms: Option<f64>,
    /// The same, the slowest of a hundred steps.
    pub rounds_ms_p99: Option<f64>,
    /// Time in crossings per token where no exchange is a barrier.
    pub flow_ms: Option<f64>,
}

/// Replays `trace` over `table`.
pub fn simulate(
    table: &PlacementTable,
    trace: &RoutingTrace,
    topology: &Topology,
    options: &SimulateOptions,
) -> Result<Simulation, SimulateError> {
    table.check_fits(trace.layers(), table.experts, table.ranks, None)?;
    if topology.len() != table.ranks {
        return Err(SimulateError::Ranks { table: table.ranks, topology: topology.len() });
    }
    if trace.experts() > table.experts {
        return Err(SimulateError::Expert { expert: trace.experts() - 1, experts: table.experts });
    }
    let (tokens, batch) = (trace.tokens(), options.batch);
    if batch == 0 || tokens < batch {
        return Err(SimulateError::Batch { tokens, batch });
    }
    let mut replay = Replay::new(table, topology, options);
    let steps = tokens / batch;
    for step in 0..steps {
        replay.step(trace, steps, step);
    }
    Ok(replay.finish(steps))
}

/// Bytes of one exchange, `[R, R]`.
struct Exchange<'t> {
    topology: &'t Topology,
    bytes: Vec<f64>,
    rows: u64,
}

impl<'t> Exchange<'t> {
    fn new(topology: &'t Topology) -> Self {
        Self { topology, bytes: vec![0.0; topology.len() * topology.len()], rows: 0 }
    }

    fn send(&mut self, from: Rank, to: Rank, bytes: f64) {
        if from != to {
            self.bytes[from.index() * self.topology.len() + to.index()] += bytes;
            self.rows += 1;
        }
    }

    /// Microseconds in rounds; none where no links are known.
    fn time_us(&self) -> Option<f64> {
        let r = self.topology.len();
        let (mut latency, mut out, mut into) = (0.0f64, vec![0.0; r], vec![0.0; r]);
        for (at, bytes) in self.bytes.iter().enumerate().filter(|(at, _)| at / r != at % r) {
            let (_, link) = self.topology.link_between(Rank::from(at / r), Rank::from(at % r))?;
            latency = latency.max(link.latency_us);
            out[at / r] += link.time_us(*bytes) - link.latency_us;
            into[at % r] += link.time_us(*bytes) - link.latency_us;
        }
        Some(latency + out.into_iter().chain(into).fold(0.0, f64::max))
    }
}

struct Replay<'r> {
    table: &'r PlacementTable,
    topology: &'r Topology,
    options: &'r SimulateOptions,
    /// `[batch]` where each stream's token is.
    residence: Vec<Rank>,
    /// `[L]` ranks that need each layer's K/V, apart from home.
    domains: Vec<Vec<Rank>>,
    transitions: f64,
    stayed: f64,
    stayed_on_host: f64,
    crossings: f64,
    exchanges: u64,
    dispatch: f64,
    combine: f64,
    kv: f64,
    traffic: Vec<f64>,
    imbalance: Vec<f64>,
    rounds_us: Vec<f64>,
    timed: bool,
    flow_us: f64,
}

impl<'r> Replay<'r> {
    fn new(table: &'r PlacementTable, topology: &'r Topology, options: &'r SimulateOptions) -> Self {
        let previous = |layer: usize| layer.checked_sub(1).unwrap_or(table.layers - 1);
        let domains = (0..table.layers).map(|l| table.ranks_of(LayerId::from(previous(l)))).collect();
        let home = |stream: usize| Rank::from(stream % table.ranks);
        Self {
            table,
            topology,
            options,
            residence: (0..options.batch).map(home).collect(),
            domains,
            transitions: 0.0,
            stayed: 0.0,
            stayed_on_host: 0.0,
            crossings: 0.0,
            exchanges: 0,
            dispatch: 0.0,
            combine: 0.0,
            kv: 0.0,
            traffic: vec![0.0; table.ranks * table.ranks],
            imbalance: Vec::new(),
            rounds_us: Vec::new(),
            timed: true,
            flow_us: 0.0,
        }
    }

    /// One token of every stream through all layers.
    fn step(&mut self, trace: &RoutingTrace, steps: usize, step: usize) {
        let mut step_us = 0.0;
        for layer in 0..self.table.layers {
            let (mut dispatch, mut combine) = (Exchange::new(self.topology), Exchange::new(self.topology));
            let mut served = vec![0.0; self.table.ranks];
            for stream in 0..self.options.batch {
                let chosen = trace.chosen(stream * steps + step, layer);
                let experts: Vec<ExpertId> = chosen.iter().map(|&id| ExpertId(id as u16)).collect();
                let from = self.residence[stream];
                let route =
                    self.table.route(self.options.strategy, LayerId::from(layer), from, &experts, &[]);
                route.serving.iter().for_each(|rank| served[rank.index()] += 1.0);
                self.context(layer, from);
                self.rows(from, &route, &mut dispatch, &mut combine);
                self.residence[stream] = route.next;
            }
            self.imbalance.extend(busiest_over_mean(&served));
            let barrier = self.options.strategy == Strategy::Vanilla;
            for (exchange, runs) in [(&dispatch, true), (&combine, barrier || combine.rows > 0)] {
                if runs && self.table.ranks > 1 {
                    self.exchanges += 1;
                    self.timed &= exchange.time_us().map(|us| step_us += us).is_some();
                }
                self.traffic.iter_mut().zip(&exchange.bytes).for_each(|(sum, bytes)| *sum += bytes);
            }
            self.dispatch += dispatch.bytes.iter().sum::<f64>();
            self.combine += combine.bytes.iter().sum::<f64>();
        }
        self.rounds_us.push(step_us);
    }

    /// K/V of a token that attends on `at`, to the rest of the layer's domain.
    fn context(&mut self, layer: usize, at: Rank) {
        if self.options.strategy == Strategy::Vanilla {
            return;
        }
        for &to in self.domains[layer].iter().filter(|&&rank| rank != at) {
            self.kv += self.options.kv_bytes;
            self.traffic[at.index() * self.table.ranks + to.index()] += self.options.kv_bytes;
        }
    }

    /// Rows of one token: to the ranks that serve it, and their outputs to where it goes on.
    fn rows(&mut self, from: Rank, route: &Route, dispatch: &mut Exchange<'_>, combine: &mut Exchange<'_>) {
        let row = self.options.row_bytes;
        let mut slowest = 0.0f64;
        for &rank in &route.ranks() {
            dispatch.send(from, rank, row);
            self.crossings += f64::from(u8::from(rank != from));
            let partials = if self.options.combine_sum {
                1
            } else {
                route.serving.iter().filter(|serving| **serving == rank).count()
            };
            (0..partials).for_each(|_| combine.send(rank, route.next, row));
            // A way there and a way on; nobody waits for who has a shorter one.
            let way =
                self.crossing_us(from, rank, row) + self.crossing_us(rank, route.next, partials as f64 * row);
            slowest = slowest.max(way);
        }
        self.flow_us += slowest;
        // Where a token attends next is where it stays or crosses to; vanilla pays for the way back as well.
        let host = |rank: Rank| self.topology.host_of(rank);
        self.transitions += 1.0;
        let ranks = route.ranks();
        self.stayed += f64::from(u8::from(ranks.iter().all(|&rank| rank == from) && route.next == from));
        let local = ranks.iter().all(|&rank| host(rank) == host(from)) && host(route.next) == host(from);
        self.stayed_on_host += f64::from(u8::from(local));
    }

    fn crossing_us(&self, from: Rank, to: Rank, bytes: f64) -> f64 {
        let link = if from == to { None } else { self.topology.link_between(from, to) };
        link.map_or(0.0, |(_, link)| link.time_us(bytes))
    }

    fn finish(mut self, steps: usize) -> Simulation {
        let (tokens, r) = ((steps * self.options.batch) as f64, self.table.ranks);
        self.rounds_us.sort_by(f64::total_cmp);
        let timed = |us: f64| self.timed.then_some(us / 1000.0);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let slowest = self.rounds_us.get((self.rounds_us.len() * 99).div_ceil(100).saturating_sub(1));
        Simulation {
            steps,
            tokens: steps * self.options.batch,
            stay_rate: self.stayed / self.transitions,
            host_stay_rate: self.stayed_on_host / self.transitions,
            crossings_per_token: self.crossings / tokens,
            exchanges_per_layer: self.exchanges as f64 / (steps * self.table.layers) as f64,
            dispatch_bytes: self.dispatch / tokens,
            combine_bytes: self.combine / tokens,
            kv_bytes: self.kv / tokens,
            traffic: self
                .traffic
                .chunks_exact(r)
                .map(|row| row.iter().map(|b| b / tokens).collect())
                .collect(),
            imbalance: mean(&self.imbalance),
            rounds_ms: timed(mean(&self.rounds_us)),
            rounds_ms_p99: timed(slowest.copied().unwrap_or(0.0)),
            flow_ms: timed(self.flow_us / tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Link, Links};

    fn linked(ranks: usize) -> Topology {
        let link = Link { latency_us: 100.0, gbit_per_s: 8.0 };
        let mut topology = Topology::uniform(ranks);
        topology.links = Some(Links { local: None, host: Some(link), network: Some(link) });
        topology
    }

    fn options(strategy: Strategy) -> SimulateOptions {
        SimulateOptions { strategy, batch: 1, row_bytes: 1000.0, kv_bytes: 10.0, combine_sum: false }
    }

    #[test]
    fn counts_what_a_token_pays_by_hand() {
        // One stream from rank 0; experts 0,1 on rank 0, 2,3 on rank 1.
        let table = PlacementTable::linear(2, 4, 2);
        let mut trace = RoutingTrace::new(2, 1);
        trace.push_token(&[2, 3]);
        trace.push_token(&[0, 2]);
        let coherent = simulate(&table, &trace, &linked(2), &options(Strategy::Coherent)).unwrap();
        // 0 -> 1, stays, 1 -> 0, 0 -> 1: three crossings of 101 µs each, one exchange a layer.
        assert_eq!((coherent.crossings_per_token, coherent.stay_rate), (1.5, 0.25));
        assert_eq!((coherent.exchanges_per_layer, coherent.combine_bytes), (1.0, 0.0));
        assert_eq!((coherent.dispatch_bytes, coherent.kv_bytes), (1500.0, 20.0));
        assert_eq!(coherent.traffic, [[0.0, 1010.0], [510.0, 0.0]]);
        assert_eq!((coherent.flow_ms, coherent.rounds_ms), (Some(0.1515), Some((0.101 + 0.1 + 0.202) / 2.0)));
        let vanilla = simulate(&table, &trace, &linked(2), &options(Strategy::Vanilla)).unwrap();
        // Home is rank 0: the three tokens' layers on rank 1 go there and back.
        assert_eq!((vanilla.crossings_per_token, vanilla.exchanges_per_layer), (1.5, 2.0));
        assert_eq!((vanilla.dispatch_bytes, vanilla.combine_bytes, vanilla.kv_bytes), (1500.0, 1500.0, 0.0));
        assert_eq!(vanilla.flow_ms, Some(0.303));
        assert!(
            simulate(&table, &trace, &Topology::uniform(2), &options(Strategy::Vanilla))
                .unwrap()
                .rounds_ms
                .is_none()
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let table = PlacementTable::linear(2, 4, 2);
        let mut trace = RoutingTrace::new(2, 1);
        trace.push_token(&[2, 3]);
        let run = |table: &PlacementTable, ranks, batch| {
            simulate(table, &trace, &linked(ranks), &SimulateOptions { batch, ..options(Strategy::Coherent) })
                .unwrap_err()
        };
        assert!(matches!(run(&table, 3, 1), SimulateError::Ranks { .. }));
        assert!(matches!(run(&table, 2, 2), SimulateError::Batch { .. }));
        assert!(matches!(run(&table, 2, 0), SimulateError::Batch { .. }));
        assert!(matches!(run(&PlacementTable::linear(3, 4, 2), 2, 1), SimulateError::Table(_)));
        assert!(matches!(run(&PlacementTable::linear(2, 3, 2), 2, 1), SimulateError::Expert { .. }));
    }
}

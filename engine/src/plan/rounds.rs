//! Rounds: in each layer all ranks attend, exchange rows, work, and exchange partials where there can be any. The slowest
//! rank is waited for each time.

use super::{FRAME_BYTES, Parts, Place, Prediction, RankTimes, Scene, TOKENS, UNCOUNTED, remote_partials};
use crate::runtime::bounds;
use exflow_placement::{Rank, Route, Strategy};

/// Sums over the counted steps.
#[derive(Default)]
struct Sums {
    seconds: f64,
    travel: f64,
    context: f64,
    exchanges: f64,
    crossings: f64,
    moves: f64,
    stays: f64,
    dispatch: f64,
    combine: f64,
    kv: f64,
}

pub(super) fn play(scene: Scene<'_>) -> Prediction {
    let Scene { measured, shape, streams, .. } = scene;
    let ranks = measured.world_size();
    let homes: Vec<usize> = (0..streams.sequences()).map(|s| s % ranks).collect();
    let mut residence = homes.clone();
    let mut mains: Vec<Option<Rank>> = vec![None; streams.sequences()];
    let mut sums = Sums::default();
    for token in 0..TOKENS {
        if token == UNCOUNTED {
            sums = Sums::default();
        }
        let mut step = Step { of: scene, homes: &homes, sums: &mut sums, kv: vec![0.0; ranks] };
        step.run(token, &mut residence, &mut mains);
    }
    let steps = (TOKENS - UNCOUNTED) as f64;
    let tokens = steps * streams.sequences() as f64;
    let step_ms = 1e3 * sums.seconds / steps;
    let (travel_ms, context_ms) = (1e3 * sums.travel / steps, 1e3 * sums.context / steps);
    Prediction {
        tokens_per_s: tokens / sums.seconds.max(1e-9),
        ms_per_token: step_ms,
        waits_per_layer: sums.exchanges / (steps * shape.moe_layers()).max(1.0),
        crossings_per_token: sums.crossings / tokens,
        stay_rate: sums.stays / sums.moves.max(1.0),
        parts: Parts { compute_ms: step_ms - travel_ms - context_ms, travel_ms, queue_ms: 0.0, context_ms },
        dispatch_bytes: sums.dispatch / tokens,
        combine_bytes: sums.combine / tokens,
        kv_bytes: sums.kv / tokens,
    }
}

struct Step<'a> {
    of: Scene<'a>,
    homes: &'a [usize],
    sums: &'a mut Sums,
    /// `[R]` bytes of keys and values that each rank sends in this step.
    kv: Vec<f64>,
}

impl Step<'_> {
    fn run(&mut self, token: usize, residence: &mut [usize], mains: &mut [Option<Rank>]) {
        let streams = self.of.streams;
        let before = self.sums.seconds;
        let ranks = self.of.measured.world_size();
        for layer in 0..self.of.shape.layers.len() {
            let mut attending = vec![0; ranks];
            residence.iter().for_each(|rank| attending[*rank] += 1);
            self.work(|rank| {
                self.of.measured.ranks[rank].attend.of(self.of.setting.strategy).at(attending[rank])
            });
            self.spread(layer, residence);
            let Some(moe) = self.of.shape.layers[layer] else {
                self.work(|rank| {
                    self.of.measured.ranks[rank].work.of(Strategy::Coherent).at(attending[rank])
                });
                continue;
            };
            let routes: Vec<Route> = (0..streams.sequences())
                .map(|sequence| {
                    let at = Place { sequence, token, moe };
                    streams.route(self.of.setting, at, Rank::from(residence[sequence]))
                })
                .collect();
            self.layer(&routes, residence);
            for ((route, residence), main) in routes.iter().zip(residence.iter_mut()).zip(mains.iter_mut()) {
                self.sums.moves += f64::from(u8::from(main.is_some()));
                self.sums.stays += f64::from(u8::from(*main == Some(route.serving[0])));
                *main = Some(route.serving[0]);
                *residence = route.next.index();
            }
        }
        let mut heads = vec![0; ranks];
        residence.iter().for_each(|rank| heads[*rank] += 1);
        self.work(|rank| self.of.measured.ranks[rank].sample.at(heads[rank]));
        self.handle_contexts();
        // Keys and values travel beside all this; a step cannot be shorter than they take.
        let sending = |rank: usize| self.kv[rank] / self.of.measured.uplink(rank);
        let longest = (0..ranks).map(sending).fold(0.0, f64::max);
        let missing = (longest - (self.sums.seconds - before)).max(0.0);
        self.sums.seconds += missing;
        self.sums.context += missing;
    }

    /// Dispatch, experts, combine.
    fn layer(&mut self, routes: &[Route], residence: &[usize]) {
        let ranks = self.of.measured.world_size();
        let (mut rows, mut pairs) = (vec![0.0; ranks], vec![0; ranks]);
        let mut partials = vec![0.0; ranks];
        let sums = self.of.setting.combine == crate::options::Combine::Sum;
        for (route, &from) in routes.iter().zip(residence) {
            for to in route.ranks() {
                let served = route.serving.iter().filter(|rank| **rank == to).count();
                pairs[to.index()] += served;
                if to.index() != from {
                    rows[from] += self.of.shape.row_bytes(served);
                    self.sums.crossings += 1.0;
                }
                if to != route.next {
                    let sent = if sums { 1 } else { served };
                    partials[to.index()] += sent as f64 * self.of.shape.partial_bytes();
                }
            }
            self.sums.crossings += remote_partials(route, self.of.setting.combine) as f64;
        }
        let frames = FRAME_BYTES * (ranks * (ranks - 1)) as f64;
        self.sums.dispatch += rows.iter().sum::<f64>() + frames;
        self.exchange(self.sending(&rows));
        let strategy = self.of.setting.strategy;
        // What was measured is a pair for each row.
        self.work(|rank| self.of.measured.ranks[rank].work.of(strategy).at(pairs[rank]));
        self.sums.exchanges += 1.0;
        let several = routes.iter().any(|route| route.serving.len() > 1);
        if strategy == Strategy::Vanilla || several || !self.of.setting.groups.is_empty() {
            self.sums.combine += partials.iter().sum::<f64>() + frames;
            self.exchange(self.sending(&partials));
            self.sums.exchanges += 1.0;
        }
    }

    /// Seconds that the busiest rank needs to send.
    fn sending(&self, bytes: &[f64]) -> f64 {
        bytes.iter().enumerate().map(|(rank, b)| b / self.of.measured.uplink(rank)).fold(0.0, f64::max)
    }

    fn exchange(&mut self, sending: f64) {
        let travel = self.of.measured.exchange_s + sending;
        let waking = |times: &RankTimes| times.waking.after(travel);
        self.sums.seconds += travel + self.of.measured.ranks.iter().map(waking).fold(0.0, f64::max);
        self.sums.travel += travel;
    }

    /// All ranks work; those that share cores take turns.
    fn work(&mut self, seconds: impl Fn(usize) -> f64) {
        let each: Vec<f64> = (0..self.of.measured.world_size()).map(seconds).collect();
        let shared: f64 = each.iter().enumerate().map(|(rank, s)| s / self.of.measured.lanes(rank)).sum();
        self.sums.seconds += each.iter().copied().fold(shared, f64::max);
    }

    /// Frames of keys and values take time of those who send and of those who receive them.
    fn handle_contexts(&mut self) {
        let ranks = self.of.measured.world_size();
        let of_step = self.of.shape.layers.len().div_ceil(crate::runtime::BULK_LAYERS);
        let handling = |rank: usize| match self.kv[rank] > 0.0 {
            true => {
                (0..ranks).map(|to| self.of.measured.link(rank, to).message_s).sum::<f64>() * of_step as f64
            }
            false => 0.0,
        };
        let seconds: Vec<f64> = (0..ranks).map(|rank| 2.0 * handling(rank)).collect();
        self.work(|rank| seconds[rank]);
    }

    /// Keys and values to the rest of the layer's domain.
    fn spread(&mut self, layer: usize, residence: &[usize]) {
        if self.of.setting.strategy != Strategy::Coherent {
            return;
        }
        let mut to_others = vec![vec![0_usize; self.kv.len()]; self.kv.len()];
        for (&from, &home) in residence.iter().zip(self.homes) {
            let before = self.of.shape.before(layer);
            let domain =
                bounds::domain(self.of.setting.groups, self.of.setting.table, before, Rank::from(home));
            domain.iter().filter(|to| to.index() != from).for_each(|to| to_others[from][to.index()] += 1);
        }
        for (from, rows) in to_others.iter().enumerate() {
            let frame = FRAME_BYTES / crate::runtime::BULK_LAYERS as f64;
            let of = |rows: &usize| match rows {
                0 => 0.0,
                rows => frame + *rows as f64 * self.of.shape.kv_bytes,
            };
            let bytes: f64 = rows.iter().map(of).sum();
            self.kv[from] += bytes;
            self.sums.kv += bytes;
        }
    }
}

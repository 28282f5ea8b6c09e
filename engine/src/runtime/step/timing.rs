//! What this rank's kernels take, by number of rows: the engine's own code on made-up rows, nothing sent. The sequence
//! whose context they read and overwrite is a made-up one too, so nothing else may run.

use super::super::coherence::{Arrived, Coherence};
use super::super::flow::board::{Picked, Serve, Token, Unit};
use super::super::frames::{Choice, PartialFrame, RowFrame};
use super::super::sequence::{Admission, Order, Sequences};
use super::super::stats::RankStats;
use super::super::worker::Worker;
use super::experts::Work;
use super::{Row, Stepper};
use crate::EngineError;
use crate::options::Combine;
use crate::plan::{Curve, RankTimes, Waking, median};
use exflow_placement::{LayerId, Rank, Route, Strategy};
use std::time::{Duration, Instant};

/// Rows that are timed.
const ROWS: [usize; 3] = [1, 4, 16];
/// Rows of the hop that all ranks time together.
pub(crate) const TOGETHER_ROWS: usize = 4;
/// Tokens of the context.
const CONTEXT: usize = 48;
/// Runs of each in a pass; the median counts.
const RUNS: usize = 3;
/// Rests after which a hop is timed; a wide link's latencies, and a narrow one's.
const RESTS: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(3), Duration::from_millis(10)];
/// Runs of the hop that all ranks time together: long enough that all are at it.
const TOGETHER_RUNS: usize = 40;

impl Worker {
    /// Calls `with` with a stepper over a made-up sequence.
    pub(in super::super) fn stepper_for_timing<T>(
        &mut self,
        with: impl FnOnce(&mut Stepper<'_>) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let spec = &self.decoder.spec;
        let mut sequences = Sequences::new(self.options.cache_blocks, spec.max_positions, Vec::new());
        let held = self.options.cache_blocks * super::super::sequence::BLOCK;
        let tokens = CONTEXT.min(spec.max_positions).min(held);
        let start = Admission { prompt: vec![0; tokens], max_tokens: 1, ..Admission::default() };
        sequences.apply(Order::Admit(start))?;
        let mut stepper = Stepper {
            sequences: &sequences,
            coherence: &mut Coherence::default(),
            stats: &mut RankStats::default(),
            round: &mut 0,
            peers: &mut Default::default(),
            ..self.stepper()
        };
        with(&mut stepper)
    }
}

/// Something to time.
#[derive(Clone, Copy)]
enum Piece {
    Hop,
    Serve,
    Begin,
    End,
    Attend,
    Layer,
    Sample,
}

impl Stepper<'_> {
    /// All of it; nothing where this rank holds no expert.
    pub(crate) fn time_all(&mut self) -> Result<RankTimes, EngineError> {
        let mut times = RankTimes { crowded: 1.0, ..RankTimes::default() };
        for strategy in [Strategy::Vanilla, Strategy::Coherent] {
            self.strategy = strategy;
            let hop = self.curve(Piece::Hop)?;
            let attend = self.curve(Piece::Attend)?;
            let layer = self.curve(Piece::Layer)?;
            let rest =
                layer.0.iter().zip(&attend.0).map(|((n, all), (_, part))| (*n, (all - 2.0 * part).max(0.0)));
            let work = Curve(rest.collect());
            match strategy {
                Strategy::Vanilla => {
                    (times.hop.vanilla, times.attend.vanilla, times.work.vanilla) = (hop, attend, work);
                }
                Strategy::Coherent => {
                    (times.hop.coherent, times.attend.coherent, times.work.coherent) = (hop, attend, work);
                }
            }
        }
        times.serve = self.curve(Piece::Serve)?;
        times.begin = self.curve(Piece::Begin)?;
        times.end = self.curve(Piece::End)?;
        times.sample = self.curve(Piece::Sample)?;
        times.waking = self.time_waking(times.hop.coherent.at(1))?;
        Ok(times)
    }

    /// What a hop of one row takes more after a rest than `awake`; the median of a few.
    fn time_waking(&mut self, awake: f64) -> Result<Waking, EngineError> {
        let Some(layer) = self.timed_layer() else { return Ok(Waking::default()) };
        let mut points = Vec::new();
        for rest in RESTS {
            let mut seconds = Vec::new();
            for _ in 0..RUNS {
                std::thread::sleep(rest);
                let began = Instant::now();
                self.once(Piece::Hop, layer, 1)?;
                seconds.push(began.elapsed().as_secs_f64());
            }
            points.push((rest.as_secs_f64(), (median(seconds) - awake).max(0.0)));
        }
        Ok(Waking(points))
    }

    /// Seconds of a hop of [`TOGETHER_ROWS`] rows, the mean of many.
    pub(crate) fn time_one_hop(&mut self) -> Result<f64, EngineError> {
        self.strategy = Strategy::Coherent;
        let Some(layer) = self.timed_layer() else { return Ok(0.0) };
        self.once(Piece::Hop, layer, TOGETHER_ROWS)?;
        let began = Instant::now();
        for _ in 0..TOGETHER_RUNS {
            self.once(Piece::Hop, layer, TOGETHER_ROWS)?;
        }
        Ok(began.elapsed().as_secs_f64() / TOGETHER_RUNS as f64)
    }

    /// A layer with experts of this rank, one with a layer behind it if there is any.
    fn timed_layer(&self) -> Option<usize> {
        let held = |layer: &usize| !self.held(*layer).is_empty();
        let all: Vec<usize> = (0..self.spec().layers).filter(held).collect();
        let inner = all.iter().rev().find(|layer| **layer > 0 && **layer + 1 < self.spec().layers);
        inner.or(all.first()).copied()
    }

    fn held(&self, layer: usize) -> Vec<u16> {
        let Some(index) = self.spec().moe_index(layer) else { return Vec::new() };
        self.tables.now().experts_of(LayerId::from(index), self.me()).into_iter().map(|e| e.0).collect()
    }

    fn curve(&mut self, piece: Piece) -> Result<Curve, EngineError> {
        let Some(layer) = self.timed_layer() else { return Ok(Curve::default()) };
        let most = self.context();
        let mut points = Vec::new();
        for rows in ROWS.into_iter().filter(|rows| *rows <= most) {
            self.once(piece, layer, rows)?; // makes pipelines
            let mut seconds = Vec::new();
            for _ in 0..RUNS {
                let began = Instant::now();
                self.once(piece, layer, rows)?;
                seconds.push(began.elapsed().as_secs_f64());
            }
            points.push((rows, median(seconds)));
        }
        Ok(Curve(points))
    }

    /// Tokens of the made-up sequence.
    fn context(&self) -> usize {
        self.sequences.running.values().map(|s| s.start.prompt.len()).sum()
    }

    fn once(&mut self, piece: Piece, layer: usize, rows: usize) -> Result<(), EngineError> {
        let layers = self.spec().layers;
        match piece {
            Piece::Hop => self.time_hop((layer + 1).min(layers), rows, true),
            Piece::Serve => self.time_hop((layer + 1).min(layers), rows, false),
            Piece::Begin => self.time_hop(0, rows, true),
            Piece::End => self.time_end(layer, rows),
            Piece::Attend => self.time_layer(layer, rows, false),
            Piece::Layer => self.time_layer(layer, rows, true),
            Piece::Sample => {
                self.decoder.reserve(2 * rows, rows)?;
                let rows = self.rows(rows);
                self.sample(&rows).map(drop)
            }
        }
    }

    /// The last positions of the sequence.
    fn rows(&self, count: usize) -> Vec<Row> {
        let first = self.context().saturating_sub(count) as u32;
        (first..first + count as u32).map(|position| Row::new(0, position, self.tables.edition())).collect()
    }

    fn residual(&self) -> Vec<f32> {
        (0..self.spec().hidden).map(|i| (i % 7) as f32 * 0.25 - 0.75).collect()
    }

    /// Row `row`'s choices among the experts of `layer` that are here.
    fn choices(&self, layer: usize, row: usize) -> Vec<Choice> {
        let held = self.held(layer);
        let top_k = self.spec().top_k.min(held.len());
        let choice = |k: usize| Choice { k: k as u16, expert: held[(row + k) % held.len()], weight: 0.5 };
        (0..top_k).map(choice).collect()
    }

    /// A hop into `stage`: of tokens whose experts are all here, or of rows that are only served.
    fn time_hop(&mut self, stage: usize, rows: usize, tokens: bool) -> Result<(), EngineError> {
        let choices = |row: usize| match stage {
            0 => Vec::new(),
            stage => self.choices(stage - 1, row),
        };
        let mut picked = Picked { stage, prefill: false, ..Picked::default() };
        for (i, row) in self.rows(rows).into_iter().enumerate() {
            if tokens {
                let mut token = Token::new(row.sequence, row.position, 0, row.edition);
                if stage > 0 {
                    (token.residual, token.choices) = (self.residual(), choices(i));
                }
                picked.units.push(Unit::new(stage, false, vec![token]));
            } else {
                picked.serves.push(Serve::new(stage, false, self.frame(row, choices(i))));
            }
        }
        if tokens && self.strategy == Strategy::Coherent && stage < self.spec().layers {
            self.arrive_contexts(stage, rows);
        }
        self.hop(&picked).map(drop)
    }

    /// The hop out of the last layer, as far as experts are here; elsewhere the head alone is timed with it.
    fn time_end(&mut self, layer: usize, rows: usize) -> Result<(), EngineError> {
        let last = self.spec().layers - 1;
        match self.held(last).is_empty() && self.spec().moe_index(last).is_some() {
            false => self.time_hop(last + 1, rows, true),
            true => self.once(Piece::Sample, layer, rows),
        }
    }

    fn frame(&self, row: Row, choices: Vec<Choice>) -> RowFrame {
        let elsewhere = (0..self.comm.world_size()).map(Rank::from).find(|rank| *rank != self.me());
        RowFrame {
            sequence: row.sequence,
            position: row.position,
            edition: row.edition,
            next: elsewhere.unwrap_or(self.me()),
            main: self.me(),
            expects: 0,
            choices,
            residual: self.residual(),
        }
    }

    /// As many rows of keys and values made elsewhere as are made here: each is made once and needed on every rank.
    fn arrive_contexts(&mut self, layer: usize, rows: usize) {
        let (width, _) = self.decoder.kv_wire();
        for row in self.rows(rows) {
            let values = vec![0.25; width];
            let arrived = Arrived { sequence: row.sequence, position: row.position, values };
            self.coherence.receive(layer as u16, arrived);
        }
    }

    /// Attention, and perhaps the rest of a layer in rounds, as if every exchange brought as many rows as it takes, with
    /// the next attention, which waits for what the rest submitted.
    fn time_layer(&mut self, layer: usize, count: usize, whole: bool) -> Result<(), EngineError> {
        let (rows, top_k, strategy) = (self.rows(count), self.spec().top_k, self.strategy);
        self.decoder.reserve(3 * count, 1)?;
        if strategy == Strategy::Coherent {
            self.arrive_contexts(layer, count);
        }
        let mut routed = self.attend(layer, &rows, strategy)?;
        if !whole {
            return Ok(());
        }
        let mut work = Work::default();
        let own: Vec<Vec<Choice>> = (0..count).map(|row| self.choices(layer, row)).collect();
        let frames: Vec<RowFrame> =
            rows.iter().zip(&own).map(|(row, choices)| self.frame(*row, choices.clone())).collect();
        let served = own.first().map_or(0, Vec::len);
        let (me, elsewhere) = (self.me(), frames.first().map_or(self.me(), |frame| frame.next));
        // Under vanilla all rows leave, as many come to be served, and all come back; under coherent half of them stay, and
        // as many come as leave.
        let staying = if strategy == Strategy::Vanilla { 0 } else { count / 2 };
        let route = |(row, choices): (usize, &Vec<Choice>)| {
            let at = if row < staying { me } else { elsewhere };
            let serving = (0..top_k).map(|k| if k < choices.len() { at } else { elsewhere }).collect();
            Route { serving, next: if strategy == Strategy::Vanilla { me } else { at } }
        };
        routed.routes = own.iter().enumerate().map(route).collect();
        for (t, choices) in own.iter().enumerate() {
            for choice in choices {
                routed.chosen[t * top_k + usize::from(choice.k)] = u32::from(choice.expert);
            }
        }
        self.run_own(layer, &rows, &routed, &mut work)?;
        let expects = (top_k - served) as u16;
        let stays_here = |frame| RowFrame { next: me, expects, ..frame };
        let arrived: Vec<RowFrame> = match strategy {
            Strategy::Vanilla => frames,
            Strategy::Coherent => frames.into_iter().skip(staying).map(stays_here).collect(),
        };
        self.put_arrived(layer, &arrived, count)?;
        self.run_arrived(layer, &arrived, count, &mut work)?;
        let hidden = self.spec().hidden;
        if !work.leaving.is_empty() {
            self.read_partials(&work)?;
        }
        // What others served comes back, a partial for each expert.
        self.combine = Combine::Exact;
        let remote = if strategy == Strategy::Vanilla { 0..top_k } else { served..top_k };
        let partial = |row: &Row, k: usize| PartialFrame {
            sequence: row.sequence,
            position: row.position,
            k: k as u16,
            values: vec![0.125; hidden],
        };
        let received = rows.iter().flat_map(|row| remote.clone().map(|k| partial(row, k))).collect();
        let coming = if strategy == Strategy::Vanilla { &[][..] } else { &arrived };
        self.settle(layer, &rows, &routed, coming, received, &mut work)?;
        if strategy == Strategy::Coherent {
            self.arrive_contexts(layer, count);
        }
        self.attend(layer, &rows, strategy).map(drop)
    }
}

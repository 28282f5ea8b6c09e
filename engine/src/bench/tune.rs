//! A short measured tuning: for each form of weights the quickest of the variants that give the same bits, kept in a file
//! that every later process of this user goes by.

mod units;

use crate::EngineError;
use crate::gpu::{
    Buffer, Cut, EXPERT_ROWS, Form, FormTuning, Gpu, LINEAR_ROWS, OnUnits, Recording, TileUpTo, Tuning,
    Usage, devices, weights_name,
};
use crate::selftest::open_tried;
use crate::weights::pack;
use exflow_shaders::params::{self, Pair, Tile};
use exflow_shaders::{Activation, Kernel, RowTile, Rows, Variant, Weights};
use std::time::Instant;

/// Measures the adapter that `adapter` names (the best one: `None`) with weights of the types that `types` names (all:
/// none), keeps what was found in its file beside what is there of others, and returns the adapter's name with the seconds
/// that it took.
///
/// # Errors
/// No such type or adapter, one that fails, or no folder to keep the file in.
pub fn tune(adapter: Option<&str>, types: &[String]) -> Result<(String, f64), EngineError> {
    let types: Vec<Weights> = types.iter().map(|name| named(name)).collect::<Result<_, _>>()?;
    let wanted = |form: &Form| types.is_empty() || types.contains(&form.weights);
    let started = Instant::now();
    // Forms without scales are made on matrix units that pass, whatever they gain.
    let scaled = OnUnits::of(Form::all().filter(|form| form.fast && wanted(form)).map(|form| form.weights));
    let gpu = open_tried(adapter, 0, (scaled, Activation::SwiGlu))?;
    let of = |form: Form| {
        let probe = Probe::new(&gpu, form)?;
        let tuned = probe.tuned()?;
        let units = form.fast && gpu.on_units().has(form.weights) && probe.units_gain(&tuned)?;
        Ok((form.name(), FormTuning { units, ..tuned }))
    };
    let tuning: Tuning = Form::all().filter(wanted).map(of).collect::<Result<_, EngineError>>()?;
    let report = devices().into_iter().find(|device| device.index == gpu.adapter());
    let report = report.ok_or_else(|| EngineError::gpu("the adapter is gone", "try again"))?;
    report.keep_tuning(tuning)?;
    Ok((report.name, started.elapsed().as_secs_f64()))
}

fn named(name: &str) -> Result<Weights, EngineError> {
    Weights::ALL.into_iter().find(|weights| weights_name(*weights) == name).ok_or_else(|| {
        let known = Weights::ALL.map(weights_name).join(", ");
        EngineError::usage(format!("no such type of weights: {name}"), format!("choose among {known}"))
    })
}

/// What another variant must gain on the one that the rules choose: less is noise.
const GAIN: f64 = 0.9;
/// Candidates are measured in turn so often: whoever else computes here disturbs all of them alike.
const PASSES: usize = 3;
/// Experts of the grouped launches, and half of the average that each of them has in rows: loads differ.
const HALVES: [usize; 8] = [1, 2, 4, 2, 0, 2, 3, 2];

/// Rows that a lane works on at once, and what they are.
type Choice = (RowTile, Rows);

/// Matrices in one form with rows for them.
struct Probe<'g> {
    gpu: &'g Gpu,
    form: Form,
    /// vec4s of rows and of columns of a matrix.
    side4: usize,
    /// Two matrices for each of the experts; products take the first of them.
    units: Vec<pack::Unit>,
    /// `[64 * 8, side]` rows that are read, and as many that are written.
    rows: [Buffer; 2],
}

/// Where the matrices are.
struct Way {
    matrix: Buffer,
    experts: Buffer,
    textures: bool,
    subgroups: bool,
}

impl<'g> Probe<'g> {
    fn new(gpu: &'g Gpu, form: Form) -> Result<Self, EngineError> {
        // Beyond what launches themselves cost, and within a second.
        let side4 = if gpu.is_cpu() { 96 } else { 256 };
        let side = 4 * side4;
        let value = |i: usize| (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
        let values: Vec<f32> = (0..side * side).map(value).collect();
        let shape = pack::Shape { height: side, columns: side };
        let one = pack::pack(form.weights, &values, shape)
            .map_err(|value| EngineError::Internal(format!("{value} is beyond what {form:?} holds")))?;
        let most = EXPERT_ROWS.last().map_or(0, |rows| pairs(*rows).0.len());
        let x: Vec<f32> = (0..most * side).map(value).collect();
        let written = gpu.buffer("rows of the tuning", 4 * (most * side) as u64, Usage::Storage)?;
        let rows = [gpu.buffer_of("rows of the tuning", &x)?, written];
        Ok(Self { gpu, form, side4, units: one.repeat(2 * HALVES.len()), rows })
    }

    fn way(&self, textures: bool, subgroups: bool) -> Result<Way, EngineError> {
        let place = |units: &[pack::Unit]| match textures {
            true => Ok(self.gpu.image_of("matrices of the tuning", units.to_vec())),
            false => self.gpu.buffer_of("matrices of the tuning", units),
        };
        let matrix = place(&self.units[..self.units.len() / (2 * HALVES.len())])?;
        Ok(Way { matrix, experts: place(&self.units)?, textures, subgroups })
    }

    /// First where matrices lie and whether lanes hand over, by one row and by eight; then the tiles.
    fn tuned(&self) -> Result<FormTuning, EngineError> {
        let rule = (self.gpu.is_cpu(), self.gpu.hands_over());
        let all = [(true, true), (false, true), (false, false)];
        let able = all.into_iter().filter(|&(_, subgroups)| self.gpu.hands_over() || !subgroups);
        let ways: Vec<Way> =
            able.map(|(textures, subgroups)| self.way(textures, subgroups)).collect::<Result<_, _>>()?;
        let first = ways.iter().position(|way| (way.textures, way.subgroups) == rule).unwrap_or(0);
        let rules = Cut::rules(self.form, self.gpu.is_cpu());
        // Each of both counts as much as it gains.
        let times = |of: usize| {
            let time = |rows| {
                let variant = self.variant(&ways[of], choice(rules.linear(rows)));
                self.linear(&ways[of], variant, rows)
            };
            Ok((time(1)? * time(8)?).sqrt())
        };
        let way = &ways[least(first, ways.len(), &times)?];
        let tiles = |points: &[usize],
                     rule: &dyn Fn(usize) -> Variant,
                     time: &dyn Fn(Choice, usize) -> Result<f64, EngineError>| {
            let of = |&rows: &usize| {
                let rule = choice(rule(rows));
                let found = quickest(rule, self.form.rows(), rows, &|choice| time(choice, rows))?;
                Ok(TileUpTo::of(rows, self.variant(way, found)))
            };
            points.iter().map(of).collect::<Result<Vec<_>, EngineError>>()
        };
        let linear = tiles(&LINEAR_ROWS, &|rows| rules.linear(rows), &|choice, rows| {
            self.linear(way, self.variant(way, choice), rows)
        })?;
        Ok(FormTuning {
            textures: way.textures,
            subgroups: way.subgroups,
            wide: self.wide_gains(way, rule.0)?,
            linear,
            experts: tiles(&EXPERT_ROWS, &|rows| rules.each(rows), &|choice, rows| {
                self.experts(way, self.variant(way, choice), rows)
            })?,
            units: false,
        })
    }

    /// Whether one row's products are for workgroups of more columns; `rule` where the matrices here are not for them.
    fn wide_gains(&self, way: &Way, rule: bool) -> Result<bool, EngineError> {
        let one = self.variant(way, (RowTile::One, self.form.rows()[0]));
        match self.gpu.widths(Kernel::Linear, one, self.side4) {
            (two, Some(three)) if way.textures => {
                let time = |of: usize| self.linear(way, [two, three][of].0, 1);
                Ok(least(usize::from(rule), 2, &time)? == 1)
            }
            _ => Ok(rule && way.textures && !self.form.fast),
        }
    }

    fn variant(&self, way: &Way, (tile, rows): Choice) -> Variant {
        let weights = self.form.weights;
        Variant { tile, weights, rows, subgroup: way.subgroups, ..Variant::default() }
    }

    /// Seconds of a product of `rows` rows.
    fn linear(&self, way: &Way, variant: Variant, rows: usize) -> Result<f64, EngineError> {
        let p = super::square_product(self.form.weights, self.side4, rows);
        let [x, y] = &self.rows;
        let buffers = [x, &way.matrix, x, x, y];
        let across = self.gpu.matrix_groups(Kernel::Linear, variant, self.side4);
        let groups = [rows.div_ceil(variant.tile_rows()) as u32, across, 1];
        seconds(self.gpu, y, &|r| r.launch(Kernel::Linear, variant, &p, &buffers, groups))
    }

    /// Seconds of the first matrices of experts with `rows` rows each on average.
    fn experts(&self, way: &Way, variant: Variant, rows: usize) -> Result<f64, EngineError> {
        let (h4, i4) = (self.side4 as u32, self.side4 as u32);
        let (w_units, w_stride) = self.form.weights.units(4 * self.side4);
        let p = params::ExpertUp {
            h4,
            i4,
            w_units: w_units as u32,
            w_stride: w_stride as u32,
            experts: HALVES.len() as u32,
            ..params::ExpertUp::default()
        };
        let (pairs, counts) = pairs(rows);
        let variant = Variant { activation: Activation::SwiGlu, ..variant };
        let tiles = tiles(&counts, variant.tile_rows());
        let across = self.gpu.matrix_groups(Kernel::ExpertUp, variant, self.side4);
        let groups = [tiles.len() as u32, across, 1];
        let (pairs, tiles) = (self.gpu.buffer_of("pairs", &pairs)?, self.gpu.buffer_of("tiles", &tiles)?);
        let [x, y] = &self.rows;
        let buffers = [x, &way.experts, &pairs, &tiles, x, y];
        seconds(self.gpu, y, &|r| r.launch(Kernel::ExpertUp, variant, &p, &buffers, groups))
    }
}

fn choice(variant: Variant) -> Choice {
    (variant.tile, variant.rows)
}

/// The tile that takes the least time for `rows` rows, and what these are, among those that could: the other tiles waste
/// most of their work, or load each weight many times.
fn quickest(
    rule: Choice,
    kinds: &[Rows],
    rows: usize,
    time: &dyn Fn(Choice) -> Result<f64, EngineError>,
) -> Result<Choice, EngineError> {
    let could = |tile: &RowTile| tile.rows() <= 2 * rows && 8 * tile.rows() >= rows;
    let all = RowTile::ALL.into_iter().filter(could);
    let all = all.flat_map(|tile| kinds.iter().map(move |&kind| (tile, kind)));
    let choices: Vec<Choice> = std::iter::once(rule).chain(all.filter(|choice| *choice != rule)).collect();
    Ok(choices[least(0, choices.len(), &|of| time(choices[of]))?])
}

/// Which of `count` candidates takes the least time; `rule` does unless another gains something.
fn least(
    rule: usize,
    count: usize,
    time: &dyn Fn(usize) -> Result<f64, EngineError>,
) -> Result<usize, EngineError> {
    let mut times = vec![f64::INFINITY; count];
    for of in (0..PASSES).flat_map(|_| 0..count) {
        times[of] = times[of].min(time(of)?);
    }
    times[rule] *= GAIN;
    Ok((0..count).fold(rule, |best, of| if times[of] < times[best] { of } else { best }))
}

/// Pairs sorted by expert, `rows` for each on average, and how many each has.
fn pairs(rows: usize) -> (Vec<Pair>, Vec<usize>) {
    let counts = HALVES.map(|half| (half * rows).div_ceil(2));
    let all = counts.iter().zip(0..).flat_map(|(&count, expert)| std::iter::repeat_n(expert, count));
    let pair = |(slot, expert): (u32, u32)| Pair { row: slot, slot, weight: 1.0, expert };
    ((0..).zip(all).map(pair).collect(), counts.to_vec())
}

fn tiles(counts: &[usize], rows: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let mut first = 0;
    for (&count, expert) in counts.iter().zip(0..) {
        for at in (0..count).step_by(rows) {
            let count = rows.min(count - at) as u32;
            tiles.push(Tile { expert, first: (first + at) as u32, count, pad: 0 });
        }
        first += count;
    }
    tiles
}

/// A run takes about so long, and the quickest of a few counts.
const RUN_SECONDS: f64 = 0.002;
const RUNS: usize = 2;

/// Seconds that one round of `record` takes, which writes to `seen`.
fn seconds(gpu: &Gpu, seen: &Buffer, record: &dyn Fn(&mut Recording<'_>)) -> Result<f64, EngineError> {
    let run = |rounds| super::run(gpu, seen, record, rounds);
    // The first one may make the pipeline.
    let once = run(1)?.min(run(1)?).max(1e-6);
    let rounds = ((RUN_SECONDS / once) as usize).clamp(1, 64);
    if rounds == 1 {
        return Ok(once);
    }
    (0..RUNS).try_fold(once, |best: f64, _| Ok(best.min(run(rounds)? / rounds as f64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gets_tiles_that_the_file_may_hold() {
        let gpu = Gpu::open(None, 0).expect("an adapter");
        for form in [false, true].map(|fast| Form::new(Weights::Q8, fast)) {
            let found = Probe::new(&gpu, form).and_then(|probe| probe.tuned()).expect("measures");
            let rows = |tiles: &[TileUpTo]| tiles.iter().map(|of| of.rows).collect::<Vec<_>>();
            assert_eq!((rows(&found.linear), rows(&found.experts)), (LINEAR_ROWS.into(), EXPERT_ROWS.into()));
            assert_eq!(found.check(form), Ok(()));
        }
    }

    #[test]
    fn wide_columns_are_measured_where_there_are_such() {
        let gpu = Gpu::open(None, 0).expect("an adapter");
        for fast in [false, true] {
            let probe = Probe::new(&gpu, Form::new(Weights::Q8, fast)).expect("fits");
            let way = probe.way(true, gpu.hands_over()).expect("fits");
            let one = probe.variant(&way, (RowTile::One, probe.form.rows()[0]));
            let (two, three) = gpu.widths(Kernel::Linear, one, probe.side4);
            assert_eq!(two.0.columns.count(), 2);
            assert_eq!(three.is_some(), gpu.is_cpu() && !fast, "rows in bytes have no such variant");
            assert!(probe.wide_gains(&way, false).is_ok_and(|gains| !gains || three.is_some()));
        }
    }

    #[test]
    fn a_type_that_there_is_not_is_told_of() {
        let error = tune(None, &["q7".to_owned()]).expect_err("no such type").to_string();
        assert!(error.contains("no such type of weights: q7"), "{error}");
    }

    #[test]
    fn pairs_are_in_tiles_of_their_expert() {
        let (pairs, counts) = pairs(5);
        assert_eq!((pairs.len(), counts.iter().sum()), (41, 41));
        let tiles = tiles(&counts, 4);
        let covered: u32 = tiles.iter().map(|tile| tile.count).sum();
        assert_eq!(covered, 41);
        for tile in tiles {
            for pair in &pairs[tile.first as usize..][..tile.count as usize] {
                assert_eq!(pair.expert, tile.expert);
            }
        }
    }

    #[test]
    fn another_tile_has_to_gain_something() {
        let at = |tile: RowTile| RowTile::ALL.iter().position(|known| *known == tile).expect("known");
        let chosen = |of: [f64; 5]| {
            quickest((RowTile::Four, Rows::F32), &[Rows::F32], 4, &|(tile, _)| Ok(of[at(tile)]))
                .expect("times")
                .0
        };
        assert_eq!(chosen([1.0, 1.0, 1.0, 0.92, 0.1]), RowTile::Four, "16 rows would be thrown away");
        assert_eq!(chosen([1.0, 1.0, 1.0, 0.8, 1.0]), RowTile::Eight);
        assert_eq!(chosen([0.8, 0.7, 1.0, 0.9, 1.0]), RowTile::Two);
    }

    #[test]
    fn what_rows_are_is_measured_where_they_may_be_rounded() {
        let chosen = |bytes: f64, floats: f64| {
            let rule = (RowTile::Four, Rows::Bytes);
            let time = |choice: Choice| {
                Ok(match choice {
                    (RowTile::Four, Rows::Bytes) => bytes,
                    (RowTile::Eight, Rows::BytesAsF32) => floats,
                    _ => 1.0,
                })
            };
            quickest(rule, Form::new(Weights::Q4, true).rows(), 4, &time).expect("times")
        };
        assert_eq!(chosen(0.9, 0.7), (RowTile::Eight, Rows::BytesAsF32));
        assert_eq!(chosen(0.7, 0.68), (RowTile::Four, Rows::Bytes));
    }
}

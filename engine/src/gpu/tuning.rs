//! Which variants of the matrix kernels an adapter runs: by rules, or as `exflow devices --tune` measured and left in a
//! file. All of them give the same bits, so that a file decides about time alone, but where numerics are fast and it has
//! matrix units make what bytes make else.

use super::kept;
use crate::EngineError;
use exflow_shaders::{Cooperative, RowTile, Rows, Variant, Weights};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What an adapter runs on matrices in one form, under one kind of numerics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FormTuning {
    /// Matrices are textures, else buffers.
    pub textures: bool,
    /// Lanes hand each other what they loaded.
    pub subgroups: bool,
    /// One row's products are made by three vec4s of columns a lane where those fill workgroups no worse, else by two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wide: bool,
    /// Tiles of products by the rows of a launch, ascending; the last one also for more rows.
    pub linear: Vec<TileUpTo>,
    /// Tiles of experts by the rows that each of them has on average, ascending; the last one also for more rows.
    pub experts: Vec<TileUpTo>,
    /// Under `--numerics fast`: its matrix units make products in less time than all of these, for one row to many. Then all
    /// are made there, and have other bits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub units: bool,
}

/// The tile for up to so many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TileUpTo {
    /// Rows at most.
    pub rows: usize,
    /// Rows that a lane works on at once: 1, 2, 4, 8 or 16.
    pub tile: usize,
    /// Bytes that rows are rounded to (`--numerics fast`) are multiplied one by one as f32, else four at a time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub as_f32: bool,
}

/// Matrices that are tuned by themselves: how their weights lie, and under which numerics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) weights: Weights,
    /// Rows are rounded to bytes.
    pub(crate) fast: bool,
}

/// What was measured of an adapter, by the names of forms.
pub(crate) type Tuning = BTreeMap<String, FormTuning>;

/// What decides about an adapter's kernels.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TuningReport {
    /// The file of measurements, which may be deleted at any time; `None`: the user's folders offer no place.
    pub path: Option<PathBuf>,
    /// Whether the file was there and is in use; else rules decide.
    pub measured: bool,
    /// Why a file that is there is not used.
    pub note: Option<String>,
    /// The forms of weights that rules decide about.
    pub by_rule: Vec<String>,
    /// What runs, by form of weights: `f32`, `f16`, `q8`, `q4`, `mx4`, and `q8_fast`, `q4_fast`, `mx4_fast` under `--numerics fast`.
    pub weights: BTreeMap<String, FormTuning>,
}

impl TuningReport {
    /// What was measured alone.
    pub(super) fn found(&self) -> Tuning {
        let measured = self.weights.iter().filter(|(form, _)| !self.by_rule.contains(form));
        measured.map(|(form, of)| (form.clone(), of.clone())).collect()
    }
}

/// Rows at which tiles of products are told apart.
pub(crate) const LINEAR_ROWS: [usize; 6] = [1, 2, 4, 8, 16, 64];
/// Rows of each expert at which its tiles are.
pub(crate) const EXPERT_ROWS: [usize; 6] = [1, 2, 5, 8, 16, 64];

/// What the file is about; a file about anything else is stale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subject {
    /// Of the file's form.
    version: u32,
    adapter: String,
    backend: String,
    driver: String,
    /// Digest of the kernels' texts.
    kernels: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    subject: Subject,
    weights: Tuning,
}

const VERSION: u32 = 3;
/// A real file has about 6 KB.
const MAX_BYTES: u64 = 64 << 10;

impl Subject {
    pub(super) fn of(adapter: &str, backend: &str, driver: &str) -> Self {
        let mut hash = Sha256::new();
        exflow_shaders::texts().for_each(|text| hash.update(text));
        let kernels = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let [adapter, backend, driver] = [adapter, backend, driver].map(str::to_owned);
        Self { version: VERSION, adapter, backend, driver, kernels }
    }

    /// The adapter's file among the user's caches.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let name: String = format!("tuning-{}-{}", self.backend, self.adapter).chars().map(plain).collect();
        kept::user_folder().map(|folder| folder.join(name).with_extension("json"))
    }

    /// What differs from a file about `other`.
    fn differs(&self, other: &Self) -> Option<&'static str> {
        let pairs = [
            (self.version != other.version, "by another version of exflow"),
            (self.adapter != other.adapter || self.backend != other.backend, "on another adapter"),
            (self.driver != other.driver, "with another version of its driver"),
            (self.kernels != other.kernels, "with other kernels"),
        ];
        pairs.into_iter().find(|(is, _)| *is).map(|(_, what)| what)
    }

    /// What the file at `path` holds of this subject; `None`: there is no file.
    pub(super) fn read(&self, path: &Path) -> Result<Option<Tuning>, String> {
        let Ok(file) = std::fs::File::open(path) else { return Ok(None) };
        let mut text = String::new();
        file.take(MAX_BYTES).read_to_string(&mut text).map_err(|e| format!("damaged: {e}"))?;
        let content: Content = serde_json::from_str(&text).map_err(|e| format!("damaged: {e}"))?;
        if let Some(what) = self.differs(&content.subject) {
            return Err(format!("measured {what}"));
        }
        for (name, form) in &content.weights {
            Form::all()
                .find(|known| known.name() == *name)
                .map_or(Err("no such weights"), |known| form.check(known))
                .map_err(|what| format!("damaged: {name}: {what}"))?;
        }
        Ok(Some(content.weights))
    }

    /// Keeps what was measured.
    pub(super) fn write(&self, path: &Path, weights: &Tuning) -> Result<(), EngineError> {
        let content = Content { subject: self.clone(), weights: weights.clone() };
        let write = || kept::replace(path, &serde_json::to_vec_pretty(&content)?);
        write().map_err(|e: std::io::Error| {
            let remedy = "make room, or set XDG_CACHE_HOME to a folder that can be written";
            EngineError::file(path, format!("cannot be written: {e}"), remedy)
        })
    }
}

impl FormTuning {
    /// Whether the engine can go by it for `form`.
    pub(crate) fn check(&self, form: Form) -> Result<(), &'static str> {
        for tiles in [&self.linear, &self.experts] {
            if tiles.is_empty() || !tiles.is_sorted_by(|a, b| a.rows < b.rows) {
                return Err("tiles are not in order");
            }
            if tiles.iter().any(|of| row_tile(of.tile).is_none()) {
                return Err("no such tile");
            }
            if !form.fast && tiles.iter().any(|of| of.as_f32) {
                return Err("rows are f32 in any case");
            }
        }
        if !form.fast && self.units {
            return Err("matrix units are for fast numerics");
        }
        if self.wide && (form.fast || !self.textures) {
            return Err("wide columns are for exact numerics and textures");
        }
        if self.textures && !self.subgroups { Err("textures without subgroups") } else { Ok(()) }
    }

    /// What the rules give an adapter.
    pub(super) fn by_rule(form: Form, is_cpu: bool, subgroups: bool) -> Self {
        let cut = Cut::rules(form, is_cpu);
        let of = |points: &[usize], variant: &dyn Fn(usize) -> Variant| -> Vec<TileUpTo> {
            points.iter().map(|&rows| TileUpTo::of(rows, variant(rows))).collect()
        };
        Self {
            textures: is_cpu,
            subgroups,
            wide: is_cpu && subgroups && !form.fast,
            linear: of(&LINEAR_ROWS, &|rows| cut.linear(rows)),
            experts: of(&EXPERT_ROWS, &|rows| cut.each(rows)),
            units: false,
        }
    }
}

impl TileUpTo {
    /// That `variant` is for up to `rows` rows.
    pub(crate) fn of(rows: usize, variant: Variant) -> Self {
        Self { rows, tile: variant.tile_rows(), as_f32: variant.rows == Rows::BytesAsF32 }
    }
}

impl Form {
    /// Matrices whose weights lie so; only where they share scales are rows ever rounded.
    pub(crate) fn new(weights: Weights, fast: bool) -> Self {
        Self { weights, fast: fast && weights.has_scales() }
    }

    /// Every one.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let fast = Weights::ALL.into_iter().filter(|weights| weights.has_scales());
        let exact = Weights::ALL.into_iter().map(|weights| Self { weights, fast: false });
        exact.chain(fast.map(|weights| Self { weights, fast: true }))
    }

    /// As files and reports call it: `f32`, `q8`, `q8_fast`.
    pub(crate) fn name(self) -> String {
        let weights = weights_name(self.weights);
        if self.fast { weights + "_fast" } else { weights }
    }

    /// What rows may be, with equal bits.
    pub(crate) fn rows(self) -> &'static [Rows] {
        if self.fast { &[Rows::Bytes, Rows::BytesAsF32] } else { &[Rows::F32] }
    }

    /// What rows are by rule: a CPU is quicker with f32 where it has enough rows to widen weights once for, and takes bytes
    /// for fewer.
    fn rows_by_rule(self, tile: RowTile, is_cpu: bool) -> Rows {
        match self.fast {
            false => Rows::F32,
            true if is_cpu && tile > RowTile::Two => Rows::BytesAsF32,
            true => Rows::Bytes,
        }
    }
}

/// Weights as users name them: `f32`, `f16`, `q8`, `q4`, `mx4`.
pub(crate) fn weights_name(weights: Weights) -> String {
    format!("{weights:?}").to_lowercase()
}

fn row_tile(rows: usize) -> Option<RowTile> {
    RowTile::ALL.into_iter().find(|tile| tile.rows() == rows)
}

/// How matrices of one form are worked on, on one adapter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut<'a> {
    pub(super) form: Form,
    pub(super) is_cpu: bool,
    /// As measured; `None`: the rules below.
    pub(super) tuned: Option<&'a FormTuning>,
    /// What products are made on; all of them, as a row has other bits elsewhere.
    pub(crate) cooperative: Cooperative,
}

impl Cut<'_> {
    /// The same on these matrix units, or on none.
    pub(crate) fn on(self, cooperative: Cooperative) -> Self {
        Self { cooperative, ..self }
    }

    /// The variant for `rows` rows of a matrix.
    pub(crate) fn linear(&self, rows: usize) -> Variant {
        // Weights are dear to load, so that a tile pays from two rows on. Tiles of 16 pay only where no registers are
        // needed to widen weights.
        let by_rule = match rows {
            0..2 => RowTile::One,
            2 => RowTile::Two,
            3..=4 => RowTile::Four,
            9.. if self.form.weights == Weights::F32 => RowTile::Sixteen,
            _ => RowTile::Eight,
        };
        self.variant(self.tuned.map(|of| &*of.linear), rows, by_rule)
    }

    /// The variant for matrices that have `rows` rows each on average, of which some have twice as many, or (0) one at most: tiles are
    /// cut for each, and what a tile lacks, or its first half or quarter where it is in that, is work that is thrown away.
    pub(crate) fn each(&self, rows: usize) -> Variant {
        let by_rule = match (rows, self.passes_halves_over()) {
            (0, _) | (1, false) => RowTile::One,
            (1, true) | (2, false) => RowTile::Two,
            (2..=3, true) | (3..=5, false) => RowTile::Four,
            (64.., _) if self.form.weights == Weights::F32 => RowTile::Sixteen,
            _ => RowTile::Eight,
        };
        self.variant(self.tuned.map(|of| &*of.experts).filter(|_| rows > 0), rows, by_rule)
    }

    /// The variant for so many rows, of which each of so many matrices has one at least.
    pub(crate) fn shared_by(&self, rows: usize, matrices: usize) -> Variant {
        self.each(match matrices {
            all if all == rows => 0,
            // None has twice the average.
            1 if self.passes_halves_over() => rows.div_ceil(2),
            _ => rows / matrices.max(1),
        })
    }

    /// Whether the second half of a tile costs nothing where its rows are not there, so that a tile pays for twice the average: on CPUs,
    /// where loading and widening weights is most of the work.
    fn passes_halves_over(&self) -> bool {
        self.is_cpu && !self.form.fast
    }

    fn variant(&self, measured: Option<&[TileUpTo]>, rows: usize, by_rule: RowTile) -> Variant {
        if let Some([few, many]) = self.cooperative.tiles() {
            let tile = if rows > few.rows() { many } else { few };
            let (weights, cooperative) = (self.form.weights, self.cooperative);
            return Variant { tile, weights, cooperative, ..Variant::default() };
        }
        let found = measured.and_then(|tiles| tiles.iter().find(|of| rows <= of.rows).or(tiles.last()));
        let tile = found.and_then(|of| row_tile(of.tile)).unwrap_or(by_rule);
        let subgroup = self.tuned.is_none_or(|of| of.subgroups);
        let rows = match found {
            Some(of) if self.form.fast => {
                if of.as_f32 {
                    Rows::BytesAsF32
                } else {
                    Rows::Bytes
                }
            }
            _ => self.form.rows_by_rule(tile, self.is_cpu),
        };
        Variant { tile, weights: self.form.weights, subgroup, rows, ..Variant::default() }
    }
}

impl<'a> Cut<'a> {
    /// What was measured of matrices in this form, on a CPU or on something else.
    pub(crate) fn tuned(form: Form, is_cpu: bool, tuned: &'a FormTuning) -> Self {
        Self { form, is_cpu, tuned: Some(tuned), cooperative: Cooperative::No }
    }
}

impl Cut<'static> {
    /// The rules for matrices in this form, on a CPU or on something else.
    pub(crate) fn rules(form: Form, is_cpu: bool) -> Self {
        Self { form, is_cpu, tuned: None, cooperative: Cooperative::No }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject::of("An Adapter (LLVM 15.0)", "vulkan", "driver 1.2")
    }

    fn tuning() -> Tuning {
        let tiles = |of: &[(usize, usize, bool)]| {
            of.iter().map(|&(rows, tile, as_f32)| TileUpTo { rows, tile, as_f32 }).collect()
        };
        let form = |fast: bool| FormTuning {
            textures: false,
            subgroups: true,
            wide: false,
            linear: tiles(&[(1, 1, fast), (8, 4, false), (64, 16, fast)]),
            experts: tiles(&[(4, 2, false)]),
            units: fast,
        };
        [false, true].map(|fast| (Form::new(Weights::Q8, fast).name(), form(fast))).into()
    }

    #[test]
    fn what_was_measured_decides_where_it_says_something() {
        let tuned = tuning();
        let [exact, fast] = [false, true].map(|fast| {
            let form = Form::new(Weights::Q8, fast);
            Cut { tuned: tuned.get(&form.name()), ..Cut::rules(form, true) }
        });
        let cut = exact;
        let tiles = [1, 2, 8, 9, 64, 1000].map(|rows| cut.linear(rows).tile_rows());
        assert_eq!(tiles, [1, 4, 4, 16, 16, 16]);
        assert_eq!([1, 4, 5].map(|rows| cut.each(rows).tile_rows()), [2, 2, 2]);
        assert!(cut.linear(1).subgroup && cut.linear(1).weights == Weights::Q8);
        assert_eq!([1, 8, 64].map(|rows| cut.linear(rows).rows), [Rows::F32; 3]);
        // Against the rules, which take bytes for one row and f32 for four.
        let rows = [1, 8, 64].map(|rows| fast.linear(rows).rows);
        assert_eq!(rows, [Rows::BytesAsF32, Rows::Bytes, Rows::BytesAsF32]);
        // Matrix units have tiles of their own, whatever was measured of lanes.
        let units = Cut { cooperative: Cooperative::Sixteen, ..cut };
        assert_eq!([1, 16, 17, 500].map(|rows| units.linear(rows).tile_rows()), [16, 16, 64, 64]);
        assert_eq!([1, 16, 17, 500].map(|rows| units.each(rows).tile_rows()), [16, 16, 64, 64]);
        assert!(units.linear(1).cooperative == Cooperative::Sixteen && !units.linear(1).subgroup);
        let rules = Cut::rules(Form::new(Weights::F32, true), true);
        assert_eq!([1, 2, 3, 6, 9].map(|rows| rules.linear(rows).tile_rows()), [1, 2, 4, 8, 16]);
        assert_eq!([0, 1, 3, 4, 64].map(|rows| rules.each(rows).tile_rows()), [1, 2, 4, 8, 16]);
        let gpu = Cut::rules(Form::new(Weights::F32, true), false);
        assert_eq!([0, 1, 2, 5, 63, 64].map(|rows| gpu.each(rows).tile_rows()), [1, 1, 2, 4, 8, 16]);
        let shown = FormTuning::by_rule(Form::new(Weights::F16, true), true, true);
        assert_eq!(shown.linear.iter().map(|of| of.tile).collect::<Vec<_>>(), [1, 2, 4, 8, 8, 8]);
        assert_eq!(shown.check(Form::new(Weights::F16, false)), Ok(()));
        for (is_cpu, expected) in [(true, [false, false, true, true, true, true]), (false, [false; 6])] {
            let shown = FormTuning::by_rule(Form::new(Weights::Q4, true), is_cpu, true);
            assert_eq!(shown.linear.iter().map(|of| of.as_f32).collect::<Vec<_>>(), expected);
            assert_eq!(shown.check(Form::new(Weights::Q4, true)), Ok(()));
        }
    }

    #[test]
    fn a_file_is_read_by_those_whom_it_is_about() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep").join("tuning.json");
        assert_eq!(subject().read(&path), Ok(None));
        subject().write(&path, &tuning()).expect("writes");
        assert_eq!(subject().read(&path), Ok(Some(tuning())));
        for (other, what) in [
            (Subject::of("Another", "vulkan", "driver 1.2"), "adapter"),
            (Subject::of("An Adapter (LLVM 15.0)", "vulkan", "driver 1.3"), "driver"),
            (Subject { kernels: "0".into(), ..subject() }, "kernels"),
            (Subject { version: 0, ..subject() }, "version"),
        ] {
            let note = other.read(&path).expect_err(what);
            assert!(note.contains(what), "{note}");
        }
    }

    #[test]
    fn a_damaged_file_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tuning.json");
        subject().write(&path, &tuning()).expect("writes");
        let whole = std::fs::read_to_string(&path).expect("reads");
        for broken in [
            whole[..whole.len() / 2].to_owned(),
            String::new(),
            whole.replace("\"q8\"", "\"q7\""),
            whole.replace("\"q8_fast\"", "\"f32\""),
            whole.replace("\"q8_fast\"", "\"q4\"").replace("\"as_f32\": true", "\"as_f32\": false"),
            whole.replace("\"tile\": 16", "\"tile\": 3"),
            whole.replacen("\"subgroups\": true", "\"subgroups\": true, \"wide\": true", 1),
            whole.replace("\"rows\": 64", "\"rows\": 1"),
            whole
                .replace("\"textures\": false", "\"textures\": true")
                .replace("\"subgroups\": true", "\"subgroups\": false"),
        ] {
            assert_ne!(broken, whole);
            std::fs::write(&path, &broken).expect("writes");
            let note = subject().read(&path).expect_err(&broken);
            assert!(note.starts_with("damaged: "), "{note}");
        }
    }
}

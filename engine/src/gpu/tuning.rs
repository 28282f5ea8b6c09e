//! Which variants of the matrix kernels an adapter runs: by rules, or as `exflow devices --tune` measured and left in a
//! file. All of them give the same bits, so that a file decides about time alone.

use super::kept;
use crate::EngineError;
use exflow_shaders::{RowTile, Rows, Variant, Weights};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What an adapter runs on matrices in one form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FormTuning {
    /// Matrices are textures, else buffers.
    pub textures: bool,
    /// Lanes hand each other what they loaded.
    pub subgroups: bool,
    /// Tiles of products by the rows of a launch, ascending; the last one also for more rows.
    pub linear: Vec<TileUpTo>,
    /// Tiles of experts by the rows that each of them has on average, ascending; the last one also for more rows.
    pub experts: Vec<TileUpTo>,
}

/// The tile for up to so many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TileUpTo {
    /// Rows at most.
    pub rows: usize,
    /// Rows that a lane works on at once: 1, 2, 4, 8 or 16.
    pub tile: usize,
}

/// What was measured of an adapter, by the names of [`form_name`].
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
    /// What runs, by form of weights.
    pub weights: BTreeMap<String, FormTuning>,
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

const VERSION: u32 = 1;
/// A real file has about 3 KB.
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
            let known = Weights::ALL.into_iter().any(|weights| form_name(weights) == *name);
            form.check()
                .and(if known { Ok(()) } else { Err("no such weights") })
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
    /// Whether the engine can go by it.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        for tiles in [&self.linear, &self.experts] {
            if tiles.is_empty() || !tiles.is_sorted_by(|a, b| a.rows < b.rows) {
                return Err("tiles are not in order");
            }
            if tiles.iter().any(|of| row_tile(of.tile).is_none()) {
                return Err("no such tile");
            }
        }
        if self.textures && !self.subgroups { Err("textures without subgroups") } else { Ok(()) }
    }

    /// What the rules give an adapter.
    pub(super) fn by_rule(form: Weights, textures: bool, subgroups: bool) -> Self {
        let cut = Cut::rules(form);
        let of = |points: &[usize], variant: &dyn Fn(usize) -> Variant| -> Vec<TileUpTo> {
            points.iter().map(|&rows| TileUpTo { rows, tile: variant(rows).tile_rows() }).collect()
        };
        Self {
            textures,
            subgroups,
            linear: of(&LINEAR_ROWS, &|rows| cut.linear(rows)),
            experts: of(&EXPERT_ROWS, &|rows| cut.each(rows)),
        }
    }
}

/// Weights as files and reports call them: `f32`, `f16`, `q8`, `q4`.
pub(crate) fn form_name(form: Weights) -> String {
    format!("{form:?}").to_lowercase()
}

fn row_tile(rows: usize) -> Option<RowTile> {
    RowTile::ALL.into_iter().find(|tile| tile.rows() == rows)
}

/// How matrices of one form are worked on, on one adapter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut<'a> {
    pub(super) form: Weights,
    /// What rows are in tiles.
    pub(super) rows: fn(RowTile) -> Rows,
    /// As measured; `None`: the rules below.
    pub(super) tuned: Option<&'a FormTuning>,
}

impl Cut<'_> {
    /// The variant for `rows` rows of a matrix.
    pub(crate) fn linear(&self, rows: usize) -> Variant {
        // Weights are dear to load, so that a tile pays from two rows on. Tiles of 16 pay only where no registers are
        // needed to widen weights.
        let by_rule = match rows {
            0..2 => RowTile::One,
            2 => RowTile::Two,
            3..=4 => RowTile::Four,
            9.. if self.form == Weights::F32 => RowTile::Sixteen,
            _ => RowTile::Eight,
        };
        self.variant(self.tuned.map(|of| &*of.linear), rows, by_rule)
    }

    /// The variant for matrices that have `rows` rows each on average: tiles are cut for each, and their rests are work
    /// that is thrown away.
    pub(crate) fn each(&self, rows: usize) -> Variant {
        let by_rule = match rows {
            0..2 => RowTile::One,
            2 => RowTile::Two,
            3..=5 => RowTile::Four,
            64.. if self.form == Weights::F32 => RowTile::Sixteen,
            _ => RowTile::Eight,
        };
        self.variant(self.tuned.map(|of| &*of.experts), rows, by_rule)
    }

    fn variant(&self, measured: Option<&[TileUpTo]>, rows: usize, by_rule: RowTile) -> Variant {
        let found = measured.and_then(|tiles| tiles.iter().find(|of| rows <= of.rows).or(tiles.last()));
        let tile = found.and_then(|of| row_tile(of.tile)).unwrap_or(by_rule);
        let subgroup = self.tuned.is_none_or(|of| of.subgroups);
        Variant { tile, weights: self.form, subgroup, rows: (self.rows)(tile), ..Variant::default() }
    }
}

impl Cut<'static> {
    /// The rules for matrices in this form.
    pub(crate) fn rules(form: Weights) -> Self {
        Self { form, rows: |_| Rows::F32, tuned: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject::of("An Adapter (LLVM 15.0)", "vulkan", "driver 1.2")
    }

    fn tuning() -> Tuning {
        let tiles = |of: &[(usize, usize)]| of.iter().map(|&(rows, tile)| TileUpTo { rows, tile }).collect();
        let form = FormTuning {
            textures: false,
            subgroups: true,
            linear: tiles(&[(1, 1), (8, 4), (64, 16)]),
            experts: tiles(&[(4, 2)]),
        };
        Tuning::from([("q8".to_owned(), form)])
    }

    #[test]
    fn what_was_measured_decides_where_it_says_something() {
        let tuned = tuning();
        let cut = Cut { tuned: tuned.get("q8"), ..Cut::rules(Weights::Q8) };
        let tiles = [1, 2, 8, 9, 64, 1000].map(|rows| cut.linear(rows).tile_rows());
        assert_eq!(tiles, [1, 4, 4, 16, 16, 16]);
        assert_eq!([1, 4, 5].map(|rows| cut.each(rows).tile_rows()), [2, 2, 2]);
        assert!(cut.linear(1).subgroup && cut.linear(1).weights == Weights::Q8);
        let rules = Cut::rules(Weights::F32);
        assert_eq!([1, 2, 3, 6, 9].map(|rows| rules.linear(rows).tile_rows()), [1, 2, 4, 8, 16]);
        assert_eq!([1, 2, 5, 63, 64].map(|rows| rules.each(rows).tile_rows()), [1, 2, 4, 8, 16]);
        let shown = FormTuning::by_rule(Weights::F16, true, true);
        assert_eq!(shown.linear.iter().map(|of| of.tile).collect::<Vec<_>>(), [1, 2, 4, 8, 8, 8]);
        assert_eq!(shown.check(), Ok(()));
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
            whole.replace("\"tile\": 16", "\"tile\": 3"),
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

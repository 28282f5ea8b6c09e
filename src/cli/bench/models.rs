//! Models that are measured under a name of their own: the bundled one, and one that is made for it.

use super::super::failure::Failure;
use exflow::study::SyntheticModel;
use std::path::{Path, PathBuf};

/// Where the bundled model is, from the repository's root.
const BUNDLED: &str = "examples/models/gpt-moe-16e";

/// A folder that goes with the process.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new(what: &str) -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("exflow-{what}-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|e| {
            Failure::Run(format!("{}: {e}; set TMPDIR to a folder that can be written", path.display()))
        })?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The folder of a model: `bundled`, `synthetic-gqa`, which is made in `scratch`, or a folder itself.
pub(super) fn model_folder(model: &str, scratch: &Path, seed: u64) -> Result<PathBuf, Failure> {
    match model {
        "bundled" => match Path::new(BUNDLED).is_dir() {
            true => Ok(PathBuf::from(BUNDLED)),
            false => Err(Failure::Input(format!(
                "the bundled model is not at {BUNDLED}: start in the repository's root, or give a folder"
            ))),
        },
        "synthetic-gqa" => {
            let path = scratch.join("synthetic-gqa");
            if !path.is_dir() {
                SyntheticModel { seed, ..SyntheticModel::default() }.write(&path)?;
            }
            Ok(path)
        }
        folder => Ok(PathBuf::from(folder)),
    }
}

//! From which size of a model on lavapipe's pool of threads pays: measured once, and kept for the processes after.
//! It has to be known before the driver is asked for anything, and so stands in a file that is not about a driver.

use super::kept;
use crate::EngineError;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    /// Cores of the machine: with others the pool is another one.
    cores: usize,
    /// Bytes of a model's files.
    from_bytes: u64,
}

const VERSION: u32 = 1;
const MAX_BYTES: u64 = 4096;

/// Bytes of a model's files from which on one rank is quicker with the driver's pool of threads, as measured on this
/// machine by `exflow devices --tune`; `None`: it was not, or the file is damaged or about another number of cores.
pub fn pool_from_bytes() -> Option<u64> {
    read(&path()?, cores())
}

/// Keeps what was measured for later processes of this user.
///
/// # Errors
/// No folder for caches, or one that cannot be written.
pub fn keep_pool_from_bytes(from_bytes: u64) -> Result<(), EngineError> {
    let path = path().ok_or_else(|| {
        EngineError::usage("there is no folder for caches", "set XDG_CACHE_HOME or HOME to a folder")
    })?;
    let content = Content { version: VERSION, cores: cores(), from_bytes };
    kept::replace(&path, &serde_json::to_vec_pretty(&content).unwrap_or_default()).map_err(|e| {
        let remedy = "make room, or set XDG_CACHE_HOME to a folder that can be written";
        EngineError::file(&path, format!("cannot be written: {e}"), remedy)
    })
}

fn path() -> Option<PathBuf> {
    kept::user_folder().map(|folder| folder.join("launch-threads.json"))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn read(path: &Path, cores: usize) -> Option<u64> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    let content: Content = serde_json::from_slice(&bytes).ok()?;
    ((content.version, content.cores) == (VERSION, cores)).then_some(content.from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_counts_on_the_machine_that_it_is_about() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep").join("threads.json");
        assert_eq!(read(&path, 2), None);
        let text = br#"{ "version": 1, "cores": 2, "from_bytes": 12345 }"#;
        kept::replace(&path, text).expect("writes");
        assert_eq!((read(&path, 2), read(&path, 3)), (Some(12345), None));
        for broken in [&text[..20], b"", br#"{ "version": 2, "cores": 2, "from_bytes": 1 }"#] {
            kept::replace(&path, broken).expect("writes");
            assert_eq!(read(&path, 2), None);
        }
    }
}

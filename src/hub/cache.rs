//! The Hub's cache folder: which snapshot a revision is, and whether it is whole.

use super::Repository;
use std::path::{Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
/// No real index comes near it; a larger one is not read.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The folder that everything of a repository stands under.
pub(super) fn folder(cache: &Path, repository: &Repository) -> PathBuf {
    cache.join(format!("models--{}", repository.id.replace('/', "--")))
}

/// The snapshot of a repository's revision, or what is missing.
pub(super) fn find(cache: &Path, repository: &Repository) -> Result<PathBuf, String> {
    let folder = folder(cache, repository);
    let snapshots = folder.join("snapshots");
    let named = std::fs::read_to_string(folder.join("refs").join(&repository.revision));
    let commit = named.unwrap_or_else(|_| repository.revision.clone());
    let commit = commit.trim();
    // A commit is a folder's name: it may not lead anywhere else.
    if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(format!("no revision {:?}", repository.revision));
    }
    let snapshot = snapshots.join(commit);
    match missing(&snapshot) {
        None => Ok(snapshot),
        Some(file) if snapshot.is_dir() => Err(format!("no {file}")),
        Some(_) => Err("no such model".to_owned()),
    }
}

/// The first file that a snapshot lacks of what makes a model.
pub(super) fn missing(snapshot: &Path) -> Option<String> {
    let lacks = |file: &str| !snapshot.join(file).is_file();
    if lacks("config.json") {
        return Some("config.json".to_owned());
    }
    if !lacks("model.safetensors") {
        return None;
    }
    let Some(shards) = shards(&snapshot.join(INDEX)) else { return Some("model.safetensors".to_owned()) };
    shards.into_iter().find(|shard| lacks(shard))
}

/// The files that an index names.
pub(super) fn shards(index: &Path) -> Option<Vec<String>> {
    if std::fs::metadata(index).ok()?.len() > MAX_INDEX_BYTES {
        return None;
    }
    let text = std::fs::read_to_string(index).ok()?;
    let value: serde_json::Value = serde_json::from_str(&text).ok()?;
    let files = value["weight_map"].as_object()?.values().filter_map(|file| file.as_str());
    let mut files: Vec<String> = files.map(str::to_owned).collect();
    files.sort_unstable();
    files.dedup();
    Some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_found_when_it_is_whole() {
        let cache = tempfile::tempdir().expect("a folder");
        let repository = Repository { id: "org/name".into(), revision: "main".into() };
        let find = || super::find(cache.path(), &repository);
        let write = |file: &str, text: &str| {
            let path = cache.path().join("models--org--name").join(file);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("writes");
        };
        assert_eq!(find(), Err("no such model".into()));
        write("refs/main", "c0ffee\n");
        write("snapshots/c0ffee/config.json", "{}");
        assert_eq!(find(), Err("no model.safetensors".into()));
        let index = format!("snapshots/c0ffee/{INDEX}");
        write(&index, r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#);
        write("snapshots/c0ffee/one.safetensors", "");
        assert_eq!(find(), Err("no two.safetensors".into()));
        write("snapshots/c0ffee/two.safetensors", "");
        let snapshot = cache.path().join("models--org--name/snapshots/c0ffee");
        assert_eq!(find(), Ok(snapshot.clone()));
        let commit = Repository { revision: "c0ffee".into(), ..repository.clone() };
        assert_eq!(super::find(cache.path(), &commit), Ok(snapshot));
        write("refs/main", "../../../etc");
        assert_eq!(find(), Err("no revision \"main\"".into()));
    }
}

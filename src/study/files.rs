//! Files of a study: affinity with the digest of its model, and the documents that are profiled.

use super::{Document, StudyError};
use exflow_placement::npy;
use exflow_placement::{Affinity, AffinityError};
use std::path::Path;

/// Array of the archive that holds the digest's ASCII codes; readers that do not know it pass over it.
const DIGEST: &str = "model_digest";

/// Writes the affinity's `.npz` with the digest of the model that it was counted on, so that a table solved
/// from it is refused by any other model.
pub fn save_affinity(path: &Path, affinity: &Affinity, digest: &str) -> Result<(), AffinityError> {
    affinity.save_npz(path)?;
    let file = |source| AffinityError::File { path: path.into(), source };
    let arrays = npy::read_npz(path).map_err(file)?;
    let codes: Vec<f64> = digest.bytes().map(f64::from).collect();
    let shape = [codes.len()];
    let mut all: Vec<(&str, &[usize], &[f64])> =
        arrays.iter().map(|(name, array)| (name.as_str(), &array.shape[..], &array.data[..])).collect();
    all.push((DIGEST, &shape, &codes));
    npy::write_npz(path, &all).map_err(file)
}

/// Reads an affinity's `.npz` and the digest of its model, where it carries one.
pub fn load_affinity(path: &Path) -> Result<(Affinity, Option<String>), AffinityError> {
    let affinity = Affinity::load_npz(path)?;
    let arrays = npy::read_npz(path).map_err(|source| AffinityError::File { path: path.into(), source })?;
    let digest = arrays.get(DIGEST).and_then(|array| {
        let letter = |code: &f64| (33.0..127.0).contains(code).then_some(*code as u8 as char);
        array.data.iter().map(letter).collect::<Option<String>>()
    });
    Ok((affinity, digest.filter(|text| !text.is_empty())))
}

/// The project's own documents under `root`: `README.md` and `docs/*.md`, in order of their names.
pub fn read_documents(root: &Path) -> Result<Vec<Document>, StudyError> {
    let at = |path: &Path, source| StudyError::Io { path: path.into(), source };
    let docs = root.join("docs");
    let mut paths = vec![root.join("README.md")];
    if docs.is_dir() {
        for entry in std::fs::read_dir(&docs).map_err(|e| at(&docs, e))? {
            paths.push(entry.map_err(|e| at(&docs, e))?.path());
        }
    }
    paths.retain(|path| path.extension().is_some_and(|e| e == "md") && path.is_file());
    paths[..].sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).map_err(|e| at(&path, e))?;
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            Ok(Document { name, text })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_travels_with_the_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.npz");
        let affinity = Affinity::zeros(3, 4);
        save_affinity(&path, &affinity, "sha256:0a1b").expect("writing");
        let (read, digest) = load_affinity(&path).expect("reading");
        assert_eq!((read, digest.as_deref()), (affinity.clone(), Some("sha256:0a1b")));
        affinity.save_npz(&path).expect("writing");
        assert_eq!(load_affinity(&path).expect("reading").1, None);
    }

    #[test]
    fn a_folder_without_documents_gives_none() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(read_documents(folder.path()).expect("reading").is_empty());
    }
}

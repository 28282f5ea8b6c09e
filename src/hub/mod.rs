//! Models by their name on the Hugging Face Hub, `org/name` or `org/name@revision`: found in the Hub's cache folder, and
//! downloaded into it where this program was built with the feature `hub`.
//!
//! The cache is the one that Hugging Face's own tools keep: `models--org--name/` with `refs/`, `snapshots/` and `blobs/`,
//! under `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.

mod cache;
#[cfg(feature = "hub")]
mod download;

use exflow_engine::Progress;
use std::path::{Path, PathBuf};

/// Why a model could not be had by its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// It is not in the cache, and may not or cannot be downloaded.
    #[error("model {model}: no such folder, and {what} in the Hub's cache {}; {remedy}", cache.display())]
    Absent {
        /// The name.
        model: String,
        /// What is missing.
        what: String,
        /// Where it was looked for.
        cache: PathBuf,
        /// What to do.
        remedy: String,
    },
    /// The Hub does not have it, or does not give it to us.
    #[error("model {model}: {what}; {remedy}")]
    Refused {
        /// The name.
        model: String,
        /// What the Hub said.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Something failed on the way.
    #[error("model {model}: {what}; {remedy}")]
    Failed {
        /// The name.
        model: String,
        /// What failed.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl HubError {
    /// Whether the caller's input is to blame rather than a failure at run time.
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::Failed { .. })
    }
}

/// What the environment says about the Hub.
#[derive(Debug, Clone)]
struct Settings {
    cache: PathBuf,
    offline: bool,
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "only downloads need it"))]
    endpoint: String,
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "only downloads need it"))]
    token: Option<String>,
}

impl Settings {
    fn from_environment() -> Self {
        Self::read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let home = || variable("HOME").or_else(|| variable("USERPROFILE")).unwrap_or_default();
        let root = || {
            let shared = || {
                let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
                cache.unwrap_or_else(|| Path::new(&home()).join(".cache")).join("huggingface")
            };
            variable("HF_HOME").map_or_else(shared, PathBuf::from)
        };
        let stored = || std::fs::read_to_string(root().join("token")).ok();
        let token = variable("HF_TOKEN").or_else(stored).map(|token| token.trim().to_owned());
        let on = |value: String| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on");
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            cache: variable("HF_HUB_CACHE").map_or_else(|| root().join("hub"), PathBuf::from),
            offline: variable("HF_HUB_OFFLINE").is_some_and(on),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
        }
    }
}

/// A model's name on the Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Repository {
    /// `org/name`.
    id: String,
    /// A branch, a tag or a commit.
    revision: String,
}

impl Repository {
    /// `None` for what can only be a path.
    fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = id.split_once('/')?;
        let plain = |part: &str| {
            let letters = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.len() <= 96 && part.chars().all(letters) && !part.starts_with('.')
        };
        // A branch may have slashes; none of its parts may lead elsewhere.
        let sound = plain(org) && plain(name) && !id.contains("..") && revision.split('/').all(plain);
        sound.then(|| Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    /// As one types it.
    fn text(&self) -> String {
        match self.revision.as_str() {
            "main" => self.id.clone(),
            revision => format!("{}@{revision}", self.id),
        }
    }
}

/// The folder of a model: `model` itself where it exists or can only be a path, else what the Hub's cache holds under
/// that name. What is not there is downloaded, if this program can and `HF_HUB_OFFLINE` does not forbid it.
///
/// # Errors
/// Where a name of the Hub leads to no model.
pub fn find(model: &Path, progress: &dyn Progress) -> Result<PathBuf, HubError> {
    let named = model.to_str().filter(|_| !model.exists()).and_then(Repository::parse);
    match named {
        None => Ok(model.to_owned()),
        Some(repository) => locate(&Settings::from_environment(), &repository, progress),
    }
}

/// The same without a download: `None` where there would have to be one, and where there is no such model.
pub fn local(model: &Path) -> Option<PathBuf> {
    local_in(&Settings::from_environment(), model)
}

fn local_in(settings: &Settings, model: &Path) -> Option<PathBuf> {
    match model.to_str().filter(|_| !model.exists()).and_then(Repository::parse) {
        None => Some(model.to_owned()),
        Some(repository) => cache::find(&settings.cache, &repository).ok(),
    }
}

/// The Hub's name of a model whose folder is a snapshot in a cache.
pub fn name_of(folder: &Path) -> Option<String> {
    let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let repository = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(repository.replacen("--", "/", 1))
}

#[cfg_attr(not(feature = "hub"), allow(unused_variables, reason = "only downloads show progress"))]
fn locate(
    settings: &Settings,
    repository: &Repository,
    progress: &dyn Progress,
) -> Result<PathBuf, HubError> {
    let missing = match cache::find(&settings.cache, repository) {
        Ok(folder) => return Ok(folder),
        Err(missing) => missing,
    };
    #[cfg(feature = "hub")]
    if !settings.offline {
        return download::fetch(settings, repository, progress);
    }
    let remedy = match settings.offline {
        true => "unset HF_HUB_OFFLINE to download it, or give a folder".to_owned(),
        false => format!(
            "fetch it with `hf download {}`, or build exflow with `--features hub`, or give a folder",
            repository.id
        ),
    };
    Err(HubError::Absent { model: repository.text(), what: missing, cache: settings.cache.clone(), remedy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let map: HashMap<_, _> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Settings::read(&|name| map.get(name).cloned())
    }

    #[test]
    fn the_environment_says_where_the_cache_is() {
        let cache = |pairs| settings(pairs).cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        let s = settings(&[("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://x/"), ("HF_TOKEN", " t\n")]);
        assert!(s.offline && s.endpoint == "http://x" && s.token.as_deref() == Some("t"));
        assert!(!settings(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn snapshots_are_known_by_their_models() {
        let name = |path: &str| name_of(Path::new(path));
        assert_eq!(name("/c/models--org--a-b/snapshots/c0ffee"), Some("org/a-b".to_owned()));
        assert_eq!(name("/c/models/gpt-moe-16e"), None);
    }

    #[test]
    fn names_lead_to_folders_of_the_cache_without_a_download() {
        let cache = tempfile::tempdir().expect("a folder");
        let settings = settings(&[("HF_HUB_CACHE", cache.path().to_str().expect("UTF-8"))]);
        let model = Path::new("org/none-such");
        assert_eq!(local_in(&settings, model), None);
        let folder = cache.path().join("models--org--none-such");
        let snapshot = folder.join("snapshots/c0ffee");
        std::fs::create_dir_all(&snapshot).expect("folders");
        std::fs::create_dir_all(folder.join("refs")).expect("a folder");
        std::fs::write(folder.join("refs/main"), "c0ffee\n").expect("a file");
        assert_eq!(local_in(&settings, model), None, "without a config.json");
        std::fs::write(snapshot.join("config.json"), "{}").expect("a file");
        std::fs::write(snapshot.join("model.safetensors"), "").expect("a file");
        assert_eq!(local_in(&settings, model), Some(snapshot));
        assert_eq!(local_in(&settings, cache.path()).as_deref(), Some(cache.path()), "a folder is itself");
    }

    #[test]
    fn names_are_told_from_paths() {
        let parsed = |text| Repository::parse(text).map(|r| (r.id, r.revision));
        let of = |id: &str, revision: &str| Some((id.to_owned(), revision.to_owned()));
        assert_eq!(parsed("allenai/OLMoE-1B-7B-0924"), of("allenai/OLMoE-1B-7B-0924", "main"));
        assert_eq!(parsed("a/b@v1.0"), of("a/b", "v1.0"));
        assert_eq!(parsed("a/b@refs/pr/3"), of("a/b", "refs/pr/3"));
        for path in
            ["model", "./a/b", "/a/b", "a/b/c", "../b", "a/..", "a/", "/", "", "a/b@", "a/b@../c", "a b/c"]
        {
            assert_eq!(parsed(path), None, "{path}");
        }
    }
}

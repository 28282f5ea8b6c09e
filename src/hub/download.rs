//! Downloads of models into the Hub's cache, file by file: what was begun goes on where it ended, sizes and hashes are
//! checked, and a revision is recorded only once all of its files are there.

use super::cache::{folder, missing};
use super::{HubError, Repository, Settings};
use exflow_engine::Progress;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::StatusCode;
use ureq::{Agent, Body, http::Response};

/// Files that are taken besides the weights.
const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];
/// No real list of files comes near it.
const MAX_LIST_BYTES: u64 = 16 << 20;
/// How often a broken connection is taken up again, file by file.
const ATTEMPTS: usize = 5;
/// How long the Hub may take to answer, and between two pieces of a file.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the Hub says of a revision.
#[derive(serde::Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

/// One of its files.
#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Large>,
}

/// A file that is kept apart, under its SHA-256.
#[derive(serde::Deserialize)]
struct Large {
    sha256: String,
    size: u64,
}

/// A file to have.
struct Wanted {
    name: String,
    size: u64,
    /// Its name among the blobs.
    blob: String,
    sha256: Option<String>,
}

struct Download<'a> {
    settings: &'a Settings,
    repository: &'a Repository,
    agent: Agent,
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
}

/// Downloads what is missing of a repository's revision; returns its snapshot.
pub(super) fn fetch(
    settings: &Settings,
    repository: &Repository,
    progress: &dyn Progress,
) -> Result<PathBuf, HubError> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("exflow/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .build();
    let agent = Agent::new_with_config(config);
    Download { settings, repository, agent, progress, done: 0, total: 0 }.run()
}

impl Download<'_> {
    fn run(mut self) -> Result<PathBuf, HubError> {
        let revision = self.list()?;
        let is_commit = |sha: &str| sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_commit(&revision.sha) {
            return Err(self.strange(&format!("its commit is {:?}", revision.sha)));
        }
        let files = self.choose(revision.siblings)?;
        self.total = files.iter().map(|file| file.size).sum();
        let root = folder(&self.settings.cache, self.repository);
        let snapshot = root.join("snapshots").join(&revision.sha);
        let made = |path: &Path| fs::create_dir_all(path).map_err(|e| self.disk(path, &e));
        made(&root.join("blobs"))?;
        made(&snapshot)?;
        for file in &files {
            let blob = root.join("blobs").join(&file.blob);
            if !blob.is_file() {
                self.get(file, &revision.sha, &blob)?;
            }
            self.tell(file.size);
            self.done += file.size;
            let place = snapshot.join(&file.name);
            link(&blob, &file.blob, &place).map_err(|e| self.disk(&place, &e))?;
        }
        if let Some(file) = missing(&snapshot) {
            let remedy = "use a model that is published as safetensors";
            return Err(self.refused(format!("the Hub has no {file} of it"), remedy));
        }
        let name = root.join("refs").join(&self.repository.revision);
        let parent = name.parent().unwrap_or(&root);
        let noted = fs::create_dir_all(parent).and_then(|()| fs::write(&name, &revision.sha));
        noted.map_err(|e| self.disk(&name, &e))?;
        Ok(snapshot)
    }

    fn list(&self) -> Result<Revision, HubError> {
        let revision = self.repository.revision.replace('/', "%2F");
        let url = format!(
            "{}/api/models/{}/revision/{revision}?blobs=true",
            self.settings.endpoint, self.repository.id
        );
        let mut response = self.request(&url, 0)?;
        let text = response.body_mut().with_config().limit(MAX_LIST_BYTES).read_to_string();
        let text = text.map_err(|e| self.failed(&format!("the list of its files broke off: {e}")))?;
        serde_json::from_str(&text)
            .map_err(|e| self.strange(&format!("the list of its files is no list: {e}")))
    }

    /// The files of the model's folder itself that make it up.
    fn choose(&self, siblings: Vec<Sibling>) -> Result<Vec<Wanted>, HubError> {
        let weights = |name: &str| name.starts_with("model") && name.ends_with(".safetensors");
        let mut files = Vec::new();
        for sibling in siblings {
            let name = sibling.rfilename;
            let plain = !name.contains(['/', '\\']) && !name.starts_with('.');
            if !plain || !(weights(&name) || FILES.contains(&name.as_str())) {
                continue;
            }
            let size = sibling.lfs.as_ref().map(|large| large.size).or(sibling.size);
            let sha256 = sibling.lfs.map(|large| large.sha256.to_ascii_lowercase());
            let blob = sha256.clone().or(sibling.blob).unwrap_or_default();
            let sound = (40..=64).contains(&blob.len()) && blob.bytes().all(|b| b.is_ascii_hexdigit());
            match size {
                Some(size) if sound => files.push(Wanted { name, size, blob, sha256 }),
                _ => return Err(self.strange(&format!("{name} has no size or no hash"))),
            }
        }
        // What is small and may be refused comes first.
        files.sort_by_key(|file| file.size);
        Ok(files)
    }

    /// Downloads a file to `blob`, going on where an earlier download ended.
    fn get(&self, file: &Wanted, commit: &str, blob: &Path) -> Result<(), HubError> {
        let part = blob.with_file_name(format!("{}.incomplete", file.blob));
        let url = format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.repository.id, file.name);
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.piece(file, &url, &part) {
                Ok(()) => {
                    last = None;
                    break;
                }
                Err(error @ HubError::Refused { .. }) => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        if let Some(error) = last {
            return Err(error);
        }
        if let Some(expected) = &file.sha256 {
            let found = sha256(&part).map_err(|e| self.disk(&part, &e))?;
            if found != *expected {
                let _ = fs::remove_file(&part);
                return Err(self.failed(&format!("{} came with SHA-256 {found}, not {expected}", file.name)));
            }
        }
        // Another process may have finished the same file in the meantime.
        match fs::rename(&part, blob) {
            Err(error) if !blob.is_file() => Err(self.disk(blob, &error)),
            _ => Ok(()),
        }
    }

    /// Writes what is missing of a file behind what is there.
    fn piece(&self, file: &Wanted, url: &str, part: &Path) -> Result<(), HubError> {
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(part);
        let mut out = open.map_err(|e| self.disk(part, &e))?;
        let mut have = out.seek(SeekFrom::End(0)).map_err(|e| self.disk(part, &e))?;
        if have > file.size {
            have = 0;
        }
        if have < file.size {
            let response = self.request(url, have)?;
            // A server that knows no ranges begins anew.
            if response.status() != StatusCode::PARTIAL_CONTENT {
                have = 0;
            }
            let cut = out.set_len(have).and_then(|()| out.seek(SeekFrom::Start(have)));
            cut.map_err(|e| self.disk(part, &e))?;
            self.copy(file, response, &mut out, have, part)?;
        }
        out.sync_all().map_err(|e| self.disk(part, &e))
    }

    fn copy(
        &self,
        file: &Wanted,
        response: Response<Body>,
        out: &mut File,
        mut have: u64,
        part: &Path,
    ) -> Result<(), HubError> {
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        while have < file.size {
            let most = (file.size - have).min(buffer.len() as u64) as usize;
            let read = body.read(&mut buffer[..most]);
            let count = read.map_err(|e| self.failed(&format!("{} broke off: {e}", file.name)))?;
            if count == 0 {
                let what = format!("{} ended after {have} of {} bytes", file.name, file.size);
                return Err(self.failed(&what));
            }
            out.write_all(&buffer[..count]).map_err(|e| self.disk(part, &e))?;
            have += count as u64;
            self.tell(have);
        }
        Ok(())
    }

    fn request(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.settings.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| self.failed(&format!("{url}: {e}")))?;
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let what = format!("the Hub does not give it to us ({url}: {})", response.status());
                Err(self.refused(what, "accept its licence on the Hub and set HF_TOKEN"))
            }
            StatusCode::NOT_FOUND => {
                let what =
                    format!("no such folder, and the Hub has none either ({url}: {})", response.status());
                Err(self.refused(what, "check the name, or give a folder"))
            }
            status => Err(self.failed(&format!("{url}: {status}"))),
        }
    }

    fn tell(&self, of_file: u64) {
        self.progress.update("download", self.done + of_file, self.total, "B");
    }

    fn refused(&self, what: String, remedy: &'static str) -> HubError {
        HubError::Refused { model: self.repository.text(), what, remedy }
    }

    fn failed(&self, what: &str) -> HubError {
        let remedy = "run the command again: what was downloaded is kept";
        HubError::Failed { model: self.repository.text(), what: what.to_owned(), remedy }
    }

    fn strange(&self, what: &str) -> HubError {
        let remedy = "check HF_ENDPOINT, which should be a Hub";
        HubError::Failed { model: self.repository.text(), what: what.to_owned(), remedy }
    }

    fn disk(&self, path: &Path, error: &io::Error) -> HubError {
        let remedy = "set HF_HOME to a folder on a disk with room";
        let what = format!("{} cannot be written: {error}", path.display());
        HubError::Failed { model: self.repository.text(), what, remedy }
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Puts a blob at its place in a snapshot: as a link, or as a copy where links cannot be made.
fn link(blob: &Path, name: &str, place: &Path) -> io::Result<()> {
    if place.is_file()
        || crate::os::link(&Path::new("../../blobs").join(name), place).is_ok()
        || place.is_file()
    {
        return Ok(());
    }
    fs::copy(blob, place).map(|_| ())
}

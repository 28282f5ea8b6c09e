//! Models by their name: from a Hub that this test serves on the loopback interface, into a cache folder, and from there.

mod common;

use common::tiny::{Folder, Tiny};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the Hub serves and what was asked of it.
#[derive(Default)]
struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    /// SHA-256 that it claims of a file, where it is not the true one.
    claims: BTreeMap<String, String>,
    /// Connections of files that break off after so many bytes, once each.
    breaks: BTreeMap<String, usize>,
    /// Path and first byte of every request.
    asked: Vec<(String, usize)>,
    token: Option<String>,
}

impl Hub {
    /// Serves until the test ends; returns its address.
    fn serve(self) -> (Arc<Mutex<Self>>, String) {
        let hub = Arc::new(Mutex::new(self));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let _ = answer(&shared, stream);
                });
            }
        });
        (hub, address)
    }

    fn list(&self) -> Value {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let hash = self.claims.get(name).cloned().unwrap_or_else(|| sha256(bytes));
            match name.ends_with(".safetensors") {
                true => json!({"rfilename": name, "size": bytes.len(), "blobId": &hash[..40],
                    "lfs": {"sha256": hash, "size": bytes.len(), "pointerSize": 134}}),
                false => json!({"rfilename": name, "size": bytes.len(), "blobId": &hash[..40]}),
            }
        };
        json!({"id": "org/tiny", "sha": COMMIT, "siblings": self.files.iter().map(sibling).collect::<Vec<_>>()})
    }
}

fn answer(hub: &Mutex<Hub>, mut stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let path = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |name: &str| {
        let of = |line: &String| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()));
        lines.iter().filter_map(of).find(|(key, _)| key == name).map(|(_, value)| value)
    };
    let from =
        header("range").and_then(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().ok());
    let from: usize = from.unwrap_or(0);
    let mut hub = hub.lock().expect("a test that goes on");
    hub.asked.push((path.clone(), from));
    if hub.token.is_some() && header("authorization") != hub.token.as_ref().map(|t| format!("Bearer {t}")) {
        return write!(stream, "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    let file = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")).map(str::to_owned);
    let body = match (&file, path.as_str()) {
        (Some(file), _) => hub.files.get(file).cloned(),
        (None, "/api/models/org/tiny/revision/main?blobs=true") => Some(hub.list().to_string().into_bytes()),
        _ => None,
    };
    let Some(body) = body else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    let body = &body[from..];
    write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len())?;
    let cut = file.and_then(|file| hub.breaks.remove(&file)).unwrap_or(body.len());
    stream.write_all(&body[..cut.min(body.len())])
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A Hub with a tiny model, whose folder also holds what is not to be downloaded.
fn hub() -> (Folder, Hub) {
    let folder = Tiny { layers: 2, experts: 4, positions: 16, seed: 5, ..Tiny::default() }.write();
    let mut hub = Hub::default();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        hub.files.insert(name.to_owned(), fs::read(folder.file(name)).expect("a file"));
    }
    for name in ["README.md", "original/model.safetensors", "pytorch_model.bin", "../model.safetensors"] {
        hub.files.insert(name.to_owned(), b"not this".to_vec());
    }
    (folder, hub)
}

fn exflow(home: &Path, endpoint: &str, more: &[(&str, &str)], model: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
    command.args(["generate", "-m", model, "--prompt-ids", "1,2", "-n", "3", "--format", "json"]);
    for name in
        ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"]
    {
        command.env_remove(name);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", endpoint).envs(more.iter().copied());
    command.output().expect("the command starts")
}

fn ids(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).expect("stdout is one JSON document");
    value["sequences"][0]["output_ids"].clone()
}

fn refused(output: &Output, code: i32, names: &[&str]) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{err}");
    assert!(output.stdout.is_empty() && err.lines().count() <= 4, "{err}");
    assert!(names.iter().all(|name| err.contains(name)), "{err}");
}

#[test]
fn a_model_is_downloaded_once_and_found_from_then_on() {
    let (folder, mut hub) = hub();
    hub.breaks.insert("model.safetensors".to_owned(), 5000);
    let (hub, endpoint) = hub.serve();
    let home = tempfile::tempdir().expect("a folder");
    let local = exflow(home.path(), &endpoint, &[], folder.path().to_str().expect("UTF-8"));
    assert_eq!(ids(&exflow(home.path(), &endpoint, &[], "org/tiny")), ids(&local));
    let asked = std::mem::take(&mut hub.lock().expect("the hub").asked);
    let weights: Vec<usize> =
        asked.iter().filter(|(path, _)| path.ends_with("model.safetensors")).map(|(_, from)| *from).collect();
    assert_eq!(weights, [0, 5000], "what broke off goes on where it ended: {asked:?}");
    assert_eq!(asked.len(), 5, "the list, two files, the weights twice: {asked:?}");
    let root = home.path().join("hub/models--org--tiny");
    assert_eq!(fs::read_to_string(root.join("refs/main")).expect("a ref"), COMMIT);
    let snapshot = root.join("snapshots").join(COMMIT);
    assert_eq!(fs::read_dir(&snapshot).expect("a snapshot").count(), 3);
    assert!(snapshot.join("model.safetensors").is_symlink(), "it stands among the blobs once");

    // From the cache: nothing is asked for, with and without a network.
    for more in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
        assert_eq!(ids(&exflow(home.path(), &endpoint, more, "org/tiny")), ids(&local));
    }
    let cache = home.path().join("hub");
    let elsewhere = [("HF_HOME", "/nowhere"), ("HF_HUB_CACHE", cache.to_str().expect("UTF-8"))];
    assert_eq!(ids(&exflow(home.path(), &endpoint, &elsewhere, "org/tiny")), ids(&local));
    assert_eq!(ids(&exflow(home.path(), &endpoint, &[], &format!("org/tiny@{COMMIT}"))), ids(&local));
    assert!(hub.lock().expect("the hub").asked.is_empty());
}

#[test]
fn what_cannot_be_had_is_named() {
    let (_folder, mut hub) = hub();
    hub.token = Some("secret".to_owned());
    hub.claims.insert("model.safetensors".to_owned(), sha256(b"something else"));
    let (hub, endpoint) = hub.serve();
    let home = tempfile::tempdir().expect("a folder");
    let run = |more: &[(&str, &str)], model| exflow(home.path(), &endpoint, more, model);
    let with_token: &[(&str, &str)] = &[("HF_TOKEN", "secret")];
    refused(&run(&[("HF_HUB_OFFLINE", "1")], "org/tiny"), 2, &["org/tiny", "HF_HUB_OFFLINE"]);
    assert!(hub.lock().expect("the hub").asked.is_empty(), "offline means that nobody is asked");
    refused(&run(&[], "org/tiny"), 2, &["org/tiny", "401", "HF_TOKEN"]);
    refused(&run(with_token, "org/none"), 2, &["org/none", "404"]);
    refused(&run(with_token, "org/tiny"), 1, &["org/tiny", "model.safetensors", "SHA-256"]);
    let blobs = home.path().join("hub/models--org--tiny/blobs");
    let left: Vec<String> = fs::read_dir(&blobs)
        .expect("blobs")
        .map(|e| e.expect("a blob").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!left.iter().any(|name| name.contains("incomplete")) && left.len() == 2, "{left:?}");
    assert!(!home.path().join("hub/models--org--tiny/refs/main").exists(), "it is no whole model");
    refused(
        &exflow(home.path(), "http://127.0.0.1:1", with_token, "org/tiny"),
        1,
        &["org/tiny", "127.0.0.1:1"],
    );
    hub.lock().expect("the hub").claims.clear();
    ids(&run(with_token, "org/tiny"));
}

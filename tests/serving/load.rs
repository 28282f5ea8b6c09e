//! 32 clients and 10,000 requests: nothing is lost, and memory does not grow. Minutes long, so it is run by
//! `make test-product`, not by `make test`.
#![cfg(target_os = "linux")]

use crate::common::tiny::Tiny;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CLIENTS: usize = 32;
const REQUESTS: usize = 10_000;
/// Requests after which pools, caches and allocators have grown to what they need.
const WARM: usize = 2_000;
/// A leak of a thousandth of a megabyte a request would show as 8.
const MOST_GROWTH_KB: i64 = 4_096;

/// The built command on a tiny model; ended with the test.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(model: &std::path::Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_exflow"))
            .args(["serve", "--port", "0", "--served-model-name", "tiny", "--max-waiting", "64", "-m"])
            .arg(model)
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr")).lines();
        let listening = lines.by_ref().map(|l| l.expect("text")).find(|l| l.contains("listening on"));
        let listening = listening.expect("it says where it listens");
        std::thread::spawn(move || lines.for_each(drop));
        let address =
            listening.split_whitespace().find(|w| w.starts_with("http://")).expect("an address").to_owned();
        Self { child, address }
    }

    /// Resident memory in kilobytes.
    fn resident_kb(&self) -> i64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("its status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).expect("a number")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn body(stream: bool) -> String {
    json!({ "model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": true, "stream": stream })
        .to_string()
}

/// One answer's text.
fn ask(agent: &ureq::Agent, address: &str, stream: bool) -> String {
    let answer = agent.post(format!("{address}/v1/completions")).send(body(stream));
    let mut answer = answer.unwrap_or_else(|e| panic!("a request is lost: {e}"));
    let text = answer.body_mut().read_to_string().expect("a body");
    let of = |json: &str| -> Option<String> {
        let value: Value = serde_json::from_str(json).ok()?;
        value["choices"][0]["text"].as_str().map(str::to_owned)
    };
    if !stream {
        return of(&text).unwrap_or_else(|| panic!("no answer: {text}"));
    }
    assert!(text.trim_end().ends_with("data: [DONE]"), "a stream is cut off: {text}");
    text.lines().filter_map(|line| line.strip_prefix("data: ").and_then(of)).collect()
}

/// `requests` by all clients together, each answer as it must be.
fn burst(address: &str, requests: usize, expected: &str) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return;
                    }
                    assert_eq!(ask(&agent, address, number.is_multiple_of(2)), expected);
                }
            });
        }
    });
}

#[test]
#[ignore = "minutes long: make test-product"]
fn ten_thousand_requests_of_32_clients() {
    let folder = Tiny { layers: 2, experts: 4, seed: 3, ..Tiny::default() }.write();
    let mut running = Running::start(folder.path());
    let address = running.address.clone();
    let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
    let expected = ask(&agent, &address, false);
    burst(&address, WARM, &expected);
    let (before, started) = (running.resident_kb(), Instant::now());
    burst(&address, REQUESTS, &expected);
    let (after, seconds) = (running.resident_kb(), started.elapsed().as_secs_f64());
    let each = REQUESTS as f64 / seconds;
    eprintln!(
        "{REQUESTS} requests of {CLIENTS} clients in {seconds:.1} s: {each:.0}/s; memory {before} kB, then {after} kB"
    );
    assert!(after - before <= MOST_GROWTH_KB, "memory grew from {before} to {after} kB");

    let metrics =
        agent.get(format!("{address}/metrics")).call().expect("metrics").body_mut().read_to_string();
    let metrics = metrics.expect("text");
    let finished = format!("exflow_requests_total{{outcome=\"finished\"}} {}", 1 + WARM + REQUESTS);
    assert!(metrics.contains(&finished), "{metrics}");
    let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", running.child.id())]).status();
    assert!(kill.expect("kill").success());
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = running.child.try_wait().expect("its status") {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}

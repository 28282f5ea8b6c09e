//! `/metrics` in Prometheus' text form: what the engine counts, and times that the server sees.

use super::App;
use crate::engine::LiveStats;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

/// What the server itself counts.
#[derive(Default)]
pub(super) struct Metrics {
    answers: Mutex<BTreeMap<(String, u16), u64>>,
    pub(super) ttft: Histogram,
    pub(super) gap: Histogram,
    pub(super) whole: Histogram,
}

/// Upper bounds in seconds, from a millisecond to a minute.
const BOUNDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Times by how long they were.
#[derive(Default)]
pub(super) struct Histogram {
    counts: Mutex<([u64; BOUNDS.len() + 1], f64)>,
}

impl Histogram {
    pub(super) fn observe(&self, seconds: f64) {
        let at = BOUNDS.partition_point(|&bound| bound < seconds);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.0[at] += 1;
        counts.1 += seconds;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let (counts, sum) = *self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        head(out, name, "histogram", help);
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(counts) {
            below += count;
            line(out, &format!("{name}_bucket{{le=\"{bound}\"}}"), below as f64);
        }
        let all: u64 = counts.iter().sum();
        line(out, &format!("{name}_bucket{{le=\"+Inf\"}}"), all as f64);
        line(out, &format!("{name}_sum"), sum);
        line(out, &format!("{name}_count"), all as f64);
    }
}

/// Counts every answer by route and status.
pub(super) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // The route as it was declared, so that clients cannot make up names.
    let path = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str()).to_owned();
    let response = next.run(request).await;
    let mut answers = app.metrics.answers.lock().unwrap_or_else(PoisonError::into_inner);
    *answers.entry((path, response.status().as_u16())).or_default() += 1;
    drop(answers);
    response
}

/// `GET /metrics`.
pub(super) async fn scrape(State(app): State<Arc<App>>) -> Response {
    let mut out = String::new();
    engine(&mut out, &app.engine.live());
    let metrics = &app.metrics;
    head(&mut out, "exflow_http_requests_total", "counter", "Answers by route and status.");
    for ((path, status), count) in metrics.answers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let name = format!("exflow_http_requests_total{{path=\"{path}\",status=\"{status}\"}}");
        line(&mut out, &name, *count as f64);
    }
    metrics.ttft.write(
        &mut out,
        "exflow_time_to_first_token_seconds",
        "From a request's arrival to its first token.",
    );
    metrics.gap.write(&mut out, "exflow_time_per_output_token_seconds", "Between a sequence's tokens.");
    metrics.whole.write(&mut out, "exflow_request_seconds", "From a request's arrival to its last token.");
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}

fn engine(out: &mut String, live: &LiveStats) {
    let requests = &live.requests;
    head(out, "exflow_requests_total", "counter", "Requests by what became of them.");
    for (outcome, count) in [
        ("submitted", requests.submitted),
        ("finished", requests.finished),
        ("cancelled", requests.cancelled),
        ("refused", requests.refused),
        ("failed", requests.failed),
    ] {
        line(out, &format!("exflow_requests_total{{outcome=\"{outcome}\"}}"), count as f64);
    }
    for (name, kind, help, value) in [
        ("exflow_prompt_tokens_total", "counter", "Tokens of prompts.", live.prompt_tokens as f64),
        ("exflow_output_tokens_total", "counter", "Tokens made.", live.output_tokens as f64),
        ("exflow_decode_steps_total", "counter", "Decode steps.", live.decode_steps as f64),
        ("exflow_prefill_steps_total", "counter", "Prefill steps.", live.prefill_steps as f64),
        ("exflow_running_requests", "gauge", "Requests that make tokens.", live.running as f64),
        ("exflow_waiting_requests", "gauge", "Requests without a token yet.", live.waiting as f64),
        ("exflow_tokens_per_second", "gauge", "Tokens made per second, lately.", live.tokens_per_s),
        ("exflow_batch_tokens", "gauge", "Tokens in a decode step, lately.", live.batch),
        (
            "exflow_exchanges_per_layer",
            "gauge",
            "Exchanges per MoE layer and step.",
            live.exchanges_per_layer,
        ),
        ("exflow_stay_rate", "gauge", "Share of layer transitions that stayed on a rank.", live.stay_rate),
    ] {
        head(out, name, kind, help);
        line(out, name, value);
    }
    moves(out, live);
    ranks(out, live);
    head(out, "exflow_link_bytes_total", "counter", "Bytes from rank to rank.");
    for (from, row) in live.traffic.iter().enumerate() {
        for (to, bytes) in row.iter().enumerate().filter(|(to, _)| *to != from) {
            line(out, &format!("exflow_link_bytes_total{{from=\"{from}\",to=\"{to}\"}}"), *bytes as f64);
        }
    }
    head(out, "exflow_bytes_total", "counter", "Bytes between ranks, by what they carry.");
    let bytes = &live.bytes;
    for (class, sum) in [
        ("dispatch", bytes.dispatch),
        ("combine", bytes.combine),
        ("kv", bytes.kv),
        ("ids", bytes.ids),
        ("control", bytes.control),
    ] {
        line(out, &format!("exflow_bytes_total{{class=\"{class}\"}}"), sum as f64);
    }
}

fn moves(out: &mut String, live: &LiveStats) {
    let moves = &live.moves;
    head(out, "exflow_moves_total", "counter", "Moves of experts to another table, by what became of them.");
    for (outcome, count) in [("asked", moves.asked), ("done", moves.done), ("refused", moves.refused)] {
        line(out, &format!("exflow_moves_total{{outcome=\"{outcome}\"}}"), count as f64);
    }
    for (name, help, value) in [
        (
            "exflow_moved_experts_total",
            "Experts that ranks read for moves that are done.",
            moves.experts as f64,
        ),
        ("exflow_move_seconds_total", "Seconds that these moves took.", moves.seconds),
    ] {
        head(out, name, "counter", help);
        line(out, name, value);
    }
}

fn ranks(out: &mut String, live: &LiveStats) {
    type Of = fn(&crate::engine::LiveRank) -> Option<f64>;
    let of_rank: [(&str, &str, &str, Of); 5] = [
        ("exflow_kv_blocks_used", "gauge", "KV cache blocks in use.", |r| Some(r.kv_blocks_used as f64)),
        ("exflow_kv_blocks", "gauge", "KV cache blocks.", |r| Some(r.kv_blocks as f64)),
        ("exflow_device_memory_bytes", "gauge", "Bytes allocated on the rank's device.", |r| {
            r.memory_bytes.map(|bytes| bytes as f64)
        }),
        ("exflow_rank_suspect", "gauge", "1 where nothing was heard from the rank's process for 1 s.", |r| {
            Some(f64::from(u8::from(r.suspect)))
        }),
        ("exflow_expert_pairs_total", "counter", "Pairs of token and expert worked on.", |r| {
            Some(r.pairs as f64)
        }),
    ];
    for (name, kind, help, value) in of_rank {
        head(out, name, kind, help);
        for (rank, stats) in live.ranks.iter().enumerate() {
            if let Some(value) = value(stats) {
                line(out, &format!("{name}{{rank=\"{rank}\"}}"), value);
            }
        }
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}"); // a String takes everything
}

fn line(out: &mut String, name: &str, value: f64) {
    let _ = writeln!(out, "{name} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_up() {
        let times = Histogram::default();
        [0.0005, 0.002, 0.002, 100.0].into_iter().for_each(|t| times.observe(t));
        let mut out = String::new();
        times.write(&mut out, "x", "of a test");
        for wanted in
            ["x_bucket{le=\"0.001\"} 1", "x_bucket{le=\"60\"} 3", "x_bucket{le=\"+Inf\"} 4", "x_count 4"]
        {
            assert!(out.contains(wanted), "{wanted} in\n{out}");
        }
        assert!(out.starts_with("# HELP x of a test\n# TYPE x histogram\n"), "{out}");
    }
}

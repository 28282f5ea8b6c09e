//! Times and CPU of many exchanges, and the line of the result that they make.

use serde::Serialize;
use std::time::Duration;

/// One line of the result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// `quic`, `tcp` or `mpi`; `quinn` is this crate's own protocol with quinn's default settings below it.
    pub transport: &'static str,
    /// Ranks that took part.
    pub ranks: usize,
    /// Payload that each rank sent to each other rank, bytes.
    pub bytes_per_peer: usize,
    /// Median time of an exchange, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Payload that one rank received, over the median time, Mbit/s.
    pub goodput_mbit_s: f64,
    /// CPU time of all ranks over all payload bytes, ns; absent where the system does not tell.
    pub cpu_ns_per_byte: Option<f64>,
    /// Shaping of the links that this line was measured over; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// A bulk transfer ran beside the exchanges.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub beside_bulk: bool,
}

/// What was measured of one transport at one size.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Time of each exchange.
    pub(super) times: Vec<Duration>,
    /// CPU time of all ranks, for all exchanges, those of the warm-up included.
    pub(super) cpu: Option<Duration>,
    /// Exchanges that `cpu` covers.
    pub(super) exchanges: usize,
}

impl Samples {
    pub(super) fn point(mut self, transport: &'static str, ranks: usize, bytes: usize) -> Point {
        self.times.sort_unstable();
        let at = |share: f64| {
            let index = ((self.times.len() as f64 * share) as usize).min(self.times.len().saturating_sub(1));
            self.times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
        };
        let (p50_us, p99_us) = (at(0.5), at(0.99));
        let received = (ranks.saturating_sub(1) * bytes) as f64;
        let total = received * ranks as f64 * self.exchanges as f64;
        Point {
            transport,
            ranks,
            bytes_per_peer: bytes,
            p50_us,
            p99_us,
            goodput_mbit_s: received * 8.0 / p50_us.max(1e-3),
            cpu_ns_per_byte: self.cpu.map(|cpu| cpu.as_secs_f64() * 1e9 / total.max(1.0)),
            link: None,
            beside_bulk: false,
        }
    }
}

/// The result as a table.
pub fn table(points: &[Point]) -> String {
    let mut text = String::from("transport  ranks  bytes/peer      p50 us      p99 us    Mbit/s  CPU ns/B\n");
    for point in points {
        let cpu = point.cpu_ns_per_byte.map_or_else(|| "-".into(), |cpu| format!("{cpu:.2}"));
        let beside = if point.beside_bulk { "  beside bulk" } else { "" };
        let line = format!(
            "{:<9} {:>6} {:>11} {:>11.0} {:>11.0} {:>9.0} {cpu:>9}{beside}\n",
            point.transport,
            point.ranks,
            point.bytes_per_peer,
            point.p50_us,
            point.p99_us,
            point.goodput_mbit_s
        );
        text.push_str(&line);
    }
    text
}

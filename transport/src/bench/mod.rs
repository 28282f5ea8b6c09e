//! What an all-to-all costs over QUIC and, in the same run, over plain TCP without encryption.
//!
//! Every iteration begins at a barrier and ends with the last byte at the slowest rank. Batches of the
//! transports take turns, so that a busy machine is unfair to both alike.

mod tcp;

use crate::quic::{self, QuicOptions};
use crate::{ByteClass, Communicator, RoundId, TransportError};
use serde::Serialize;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Payload sizes per peer that are measured by default, bytes.
pub const SIZES: [usize; 5] = [1024, 16384, 262_144, 1_048_576, 4_194_304];
/// Turns that each transport takes per size.
const TURNS: usize = 5;
/// Iterations of a turn before those that count.
const WARM_UP: usize = 3;

/// One line of the result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// `quic` or `tcp`.
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
}

/// Anything that can run one exchange of `bytes` per peer.
trait Subject: Send {
    fn exchange(&mut self, bytes: usize) -> Result<(), TransportError>;
}

struct Quic {
    comm: quic::QuicCommunicator,
    number: u64,
}

impl Subject for Quic {
    fn exchange(&mut self, bytes: usize) -> Result<(), TransportError> {
        let round = RoundId { number: self.number, class: ByteClass::Dispatch, layer: u16::MAX };
        self.number += 1;
        let send = vec![vec![7; bytes]; self.comm.world_size()];
        self.comm.exchange(round, send).map(drop)
    }
}

/// Measures `ranks` ranks of this process over the loopback interface, for each of `sizes`.
pub fn alltoall_loopback(
    ranks: usize,
    sizes: &[usize],
    options: &QuicOptions,
) -> Result<Vec<Point>, TransportError> {
    let world = quic::loopback_world(ranks, options.clone())?;
    let mut quic: Vec<_> = world.into_iter().map(|comm| Quic { comm, number: 0 }).collect();
    let mut tcp = tcp::loopback_world(ranks)?;
    let mut points = Vec::new();
    for &bytes in sizes {
        let iterations = iterations(bytes);
        let (mut with_quic, mut with_tcp) = (Samples::default(), Samples::default());
        for _ in 0..TURNS {
            turn(&mut tcp, bytes, iterations, &mut with_tcp)?;
            turn(&mut quic, bytes, iterations, &mut with_quic)?;
        }
        points.push(with_quic.point("quic", ranks, bytes));
        points.push(with_tcp.point("tcp", ranks, bytes));
    }
    Ok(points)
}

/// Enough for a 99th percentile of small messages, within seconds for large ones.
fn iterations(bytes: usize) -> usize {
    (20_000_000 / (bytes + 20_000)).clamp(6, 300)
}

#[derive(Default)]
struct Samples {
    times: Vec<Duration>,
    cpu: Option<Duration>,
    exchanges: usize,
}

impl Samples {
    fn point(mut self, transport: &'static str, ranks: usize, bytes: usize) -> Point {
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
        }
    }
}

/// Runs one turn of a transport on one thread per rank.
fn turn(
    subjects: &mut [impl Subject],
    bytes: usize,
    iterations: usize,
    samples: &mut Samples,
) -> Result<(), TransportError> {
    let all = WARM_UP + iterations;
    let barrier = Barrier::new(subjects.len());
    let spans = Mutex::new(vec![(Duration::MAX, Duration::ZERO); all]);
    let (began, cpu_before) = (Instant::now(), cpu_time());
    std::thread::scope(|scope| {
        let ranks: Vec<_> = subjects
            .iter_mut()
            .map(|subject| {
                scope.spawn(|| {
                    let mut result = Ok(());
                    for at in 0..all {
                        barrier.wait();
                        let start = began.elapsed();
                        // After an error the others still need this thread at the barrier.
                        result = result.and_then(|()| subject.exchange(bytes));
                        let end = began.elapsed();
                        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
                        spans[at] = (spans[at].0.min(start), spans[at].1.max(end));
                    }
                    result
                })
            })
            .collect();
        ranks.into_iter().try_for_each(|rank| match rank.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    if let (Some(before), Some(after)) = (cpu_before, cpu_time()) {
        *samples.cpu.get_or_insert_default() += after.saturating_sub(before);
    }
    samples.exchanges += all;
    let spans = spans.into_inner().unwrap_or_else(PoisonError::into_inner);
    samples.times.extend(spans[WARM_UP..].iter().map(|(start, end)| end.saturating_sub(*start)));
    Ok(())
}

/// CPU time of this process so far, in steps of 10 ms.
fn cpu_time() -> Option<Duration> {
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses that may hold spaces; user and system time are 14th and 15th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u32>().ok()? + fields.next()?.parse::<u32>().ok()?;
    Some(TICK * ticks)
}

/// The result as a table.
pub fn table(points: &[Point]) -> String {
    let mut text = String::from("transport  ranks  bytes/peer      p50 us      p99 us    Mbit/s  CPU ns/B\n");
    for point in points {
        let cpu = point.cpu_ns_per_byte.map_or_else(|| "-".into(), |cpu| format!("{cpu:.2}"));
        let line = format!(
            "{:<9} {:>6} {:>11} {:>11.0} {:>11.0} {:>9.0} {cpu:>9}\n",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_transports_are_measured_for_each_size() {
        let points = alltoall_loopback(3, &[100, 70_000], &QuicOptions::loopback()).expect("bench");
        let names: Vec<_> = points.iter().map(|point| (point.transport, point.bytes_per_peer)).collect();
        assert_eq!(names, [("quic", 100), ("tcp", 100), ("quic", 70_000), ("tcp", 70_000)]);
        assert!(points.iter().all(|point| point.p50_us > 0.0 && point.p99_us >= point.p50_us));
        assert_eq!(table(&points).lines().count(), 5);
    }
}

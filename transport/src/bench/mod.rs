//! What an all-to-all costs over QUIC and, in the same run, over plain TCP without encryption, over MPI where it
//! is asked for, and with quinn's default settings.
//!
//! Every exchange begins at a barrier and ends with the last byte at the slowest rank. Every transport sends from
//! a buffer that is there and leaves each peer's payload whole in memory. Turns of the transports alternate, so
//! that a busy machine is unfair to all alike.

mod hosts;
mod mpi;
mod samples;
mod subject;
mod tcp;

pub use hosts::between_hosts;
pub use mpi::MpiLaunch;
pub use samples::{Point, table};

use crate::TransportError;
use crate::cpu_time;
use crate::quic::{self, QuicOptions};
use samples::Samples;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};
use subject::{Quic, Subject};

/// Payload sizes per peer that are measured by default, bytes.
pub const SIZES: [usize; 5] = [1024, 16384, 262_144, 1_048_576, 4_194_304];
/// Exchanges of a turn before those that count.
const WARM_UP: usize = 3;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Order {
    /// Payload sizes per peer, bytes.
    pub sizes: Vec<usize>,
    /// Turns that each transport takes per size.
    pub turns: usize,
    /// Settings of the `quic` rows.
    pub quic: QuicOptions,
    /// Also measure with quinn's default settings (`quinn` rows).
    pub quinn_defaults: bool,
    /// Also measure `MPI_Alltoallv`, started like this.
    pub mpi: Option<MpiLaunch>,
    /// Also measure the QUIC rows while every rank sends every other one bulk.
    pub beside_bulk: bool,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            sizes: SIZES.to_vec(),
            turns: 5,
            quic: QuicOptions::loopback(),
            quinn_defaults: false,
            mpi: None,
            beside_bulk: false,
        }
    }
}

impl Order {
    fn check(&self) -> Result<(), TransportError> {
        let wrong = |what: String, remedy: &str| Err(TransportError::Options { what, remedy: remedy.into() });
        match self.sizes.iter().max() {
            None => wrong("no sizes".into(), "give at least one"),
            Some(largest) if *largest > self.quic.max_frame_bytes as usize => {
                let cap = self.quic.max_frame_bytes;
                wrong(format!("{largest} bytes per peer"), &format!("choose at most {cap}"))
            }
            Some(_) if self.turns == 0 => wrong("0 turns".into(), "choose at least 1"),
            Some(_) => Ok(()),
        }
    }
}

/// Enough for a 99th percentile of small messages, within seconds for large ones.
fn iterations(bytes: usize) -> usize {
    (20_000_000 / (bytes + 20_000)).clamp(6, 300)
}

/// Measures `ranks` ranks of this process over the loopback interface.
pub fn loopback(ranks: usize, order: &Order) -> Result<Vec<Point>, TransportError> {
    order.check()?;
    let mpi = order.mpi.as_ref().map(mpi::Program::compile).transpose()?;
    let mut quic = Quic::world(quic::loopback_world(ranks, order.quic.clone())?);
    let mut tcp = tcp::loopback_world(ranks)?;
    let mut quinn = match order.quinn_defaults {
        true => {
            let options = QuicOptions { link: order.quic.link, ..QuicOptions::quinn_defaults() };
            Quic::world(quic::loopback_world(ranks, options)?)
        }
        false => Vec::new(),
    };
    let mut points = Vec::new();
    for &bytes in &order.sizes {
        let mut lines: [(&'static str, Samples); 5] =
            ["quic", "tcp", "quinn", "mpi", "quic"].map(|name| (name, Samples::default()));
        for _ in 0..order.turns {
            turn(&mut quic, bytes, &mut lines[0].1)?;
            turn(&mut tcp, bytes, &mut lines[1].1)?;
            if !quinn.is_empty() {
                turn(&mut quinn, bytes, &mut lines[2].1)?;
            }
            if let Some(mpi) = &mpi {
                mpi.turn(ranks, bytes, iterations(bytes), &mut lines[3].1)?;
            }
            if order.beside_bulk {
                quic.iter_mut().for_each(Quic::begin_bulk);
                turn(&mut quic, bytes, &mut lines[4].1)?;
                quic.iter_mut().try_for_each(Quic::end_bulk)?;
                quic.iter_mut().try_for_each(Quic::drain_bulk)?;
            }
        }
        points.extend(order.points(lines, ranks, bytes));
    }
    Ok(points)
}

impl Order {
    /// The lines of those that were measured.
    fn points(&self, lines: [(&'static str, Samples); 5], ranks: usize, bytes: usize) -> Vec<Point> {
        let link = self.quic.link.map(|link| link.to_string());
        let measured = lines.into_iter().enumerate().filter(|(_, (_, samples))| !samples.times.is_empty());
        measured
            .map(|(at, (name, samples))| Point {
                // Only packets of our own sockets are shaped.
                link: link.clone().filter(|_| matches!(name, "quic" | "quinn")),
                beside_bulk: at == 4,
                ..samples.point(name, ranks, bytes)
            })
            .collect()
    }
}

/// Runs one turn of a transport on one thread per rank.
fn turn(subjects: &mut [impl Subject], bytes: usize, samples: &mut Samples) -> Result<(), TransportError> {
    let all = WARM_UP + iterations(bytes);
    let barrier = Barrier::new(subjects.len());
    let spans = Mutex::new(vec![(Duration::MAX, Duration::ZERO); all]);
    subjects.iter_mut().for_each(|subject| subject.prepare(bytes));
    let (began, cpu_before) = (Instant::now(), cpu_time());
    std::thread::scope(|scope| {
        let ranks: Vec<_> = subjects
            .iter_mut()
            .map(|subject| {
                scope.spawn(|| {
                    let mut result = Ok(());
                    for at in 0..all {
                        // After an error the others still need this thread at the barrier.
                        result = result.and_then(|()| subject.between());
                        barrier.wait();
                        let start = began.elapsed();
                        result = result.and_then(|()| subject.exchange());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transport_is_measured_for_each_size() {
        let order = Order {
            sizes: vec![100, 70_000],
            turns: 1,
            quinn_defaults: true,
            beside_bulk: true,
            ..Order::default()
        };
        let points = loopback(3, &order).expect("bench");
        let names: Vec<_> =
            points.iter().map(|point| (point.transport, point.bytes_per_peer, point.beside_bulk)).collect();
        let expected = [100, 70_000].map(|bytes| {
            [("quic", bytes, false), ("tcp", bytes, false), ("quinn", bytes, false), ("quic", bytes, true)]
        });
        assert_eq!(names, expected.concat());
        assert!(points.iter().all(|point| point.p50_us > 0.0 && point.p99_us >= point.p50_us));
        assert_eq!(table(&points).lines().count(), 9);
    }

    #[test]
    fn orders_that_cannot_be_measured_are_refused() {
        let refused = |order: Order| loopback(2, &order).expect_err("refused").to_string();
        assert!(refused(Order { sizes: vec![], ..Order::default() }).contains("no sizes"));
        assert!(refused(Order { sizes: vec![1 << 40], ..Order::default() }).contains("choose at most"));
    }
}

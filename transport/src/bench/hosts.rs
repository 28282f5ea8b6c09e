//! The same measurement with one process per host: each runs one rank of every transport.

use super::samples::Samples;
use super::subject::{Quic, Subject};
use super::tcp::{Ear, Tcp};
use super::{Order, Point, WARM_UP, iterations, mpi};
use crate::cpu_time;
use crate::quic::{self, JoinOptions, QuicOptions};
use crate::{Communicator, TransportError};
use bytes::Bytes;
use exflow_placement::Rank;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// One process's transports and the way to meet the others.
struct Host {
    rank: Rank,
    ranks: usize,
    quic: Quic,
    quinn: Option<Quic>,
    tcp: Tcp,
    /// Barriers and results travel here.
    meeting: Tcp,
}

/// Measures between processes that all call this with the same order; the lines are given at rank 0 and are empty
/// elsewhere. Time is each rank's own from the barrier on, that of the slowest rank counts.
pub fn between_hosts(join: JoinOptions, order: &Order) -> Result<Vec<Point>, TransportError> {
    order.check()?;
    let mut host = Host::join(join, order)?;
    let program = match (&order.mpi, host.rank) {
        (Some(launch), Rank(0)) => Some(mpi::Program::compile(launch)?),
        _ => None,
    };
    let mut points = Vec::new();
    for &bytes in &order.sizes {
        let mut lines: [(&'static str, Samples); 5] =
            ["quic", "tcp", "quinn", "mpi", "quic"].map(|name| (name, Samples::default()));
        for _ in 0..order.turns {
            turn(&mut host.quic, &mut host.meeting, bytes, &mut lines[0].1)?;
            turn(&mut host.tcp, &mut host.meeting, bytes, &mut lines[1].1)?;
            if let Some(quinn) = &mut host.quinn {
                turn(quinn, &mut host.meeting, bytes, &mut lines[2].1)?;
            }
            if let Some(program) = &program {
                program.turn(host.ranks, bytes, iterations(bytes), &mut lines[3].1)?;
            }
            // The others wait here while rank 0 runs the MPI program.
            host.meeting.gather(&[0])?;
            if order.beside_bulk {
                host.quic.begin_bulk();
                turn(&mut host.quic, &mut host.meeting, bytes, &mut lines[4].1)?;
                host.quic.end_bulk()?;
                host.quic.drain_bulk()?;
            }
        }
        if host.rank == Rank(0) {
            points.extend(order.points(lines, host.ranks, bytes));
        }
    }
    host.meeting.gather(&[0])?;
    Ok(points)
}

impl Host {
    fn join(join: JoinOptions, order: &Order) -> Result<Self, TransportError> {
        let (rank, ranks, on) = (join.rank, join.world_size, join.listen.ip());
        let defaults = QuicOptions { link: order.quic.link, ..QuicOptions::quinn_defaults() };
        // The two worlds live at the same time, so the second has its own ports.
        let mut second = JoinOptions { quic: defaults, ..join.clone() };
        if second.listen.port() != 0 {
            second.listen.set_port(second.listen.port().saturating_add(1));
        }
        second.leader = second.leader.as_deref().map(next_port);
        let mut quic = Quic::new(quic::join(join)?);
        let quinn = match order.quinn_defaults {
            true => Some(Quic::new(quic::join(second)?)),
            false => None,
        };
        let tcp = mesh(rank, on, &mut quic)?;
        let meeting = mesh(rank, on, &mut quic)?;
        Ok(Self { rank, ranks, quic, quinn, tcp, meeting })
    }
}

/// The address whose port is one more.
fn next_port(address: &str) -> String {
    let parts = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    parts.map_or_else(|| address.to_owned(), |(host, port)| format!("{host}:{}", port.saturating_add(1)))
}

/// A mesh of TCP connections beside the QUIC ones.
fn mesh(rank: Rank, on: IpAddr, quic: &mut Quic) -> Result<Tcp, TransportError> {
    let ear = Ear::open(rank, on)?;
    let ports = quic.all_gather(Bytes::copy_from_slice(&ear.port()?.to_le_bytes()))?;
    let links = quic.comm().links();
    let addresses: Vec<SocketAddr> = ports
        .iter()
        .enumerate()
        .map(|(peer, port)| {
            let port = <[u8; 2]>::try_from(&port[..]).map_or(0, u16::from_le_bytes);
            let link = links.iter().find(|link| link.peer == Rank::from(peer));
            SocketAddr::new(link.map_or(on, |link| link.address.ip()), port)
        })
        .collect();
    debug_assert_eq!(addresses.len(), quic.comm().world_size());
    ear.mesh(&addresses)
}

/// Runs one turn of a transport; every process gets the same samples.
fn turn(
    subject: &mut impl Subject,
    meeting: &mut Tcp,
    bytes: usize,
    samples: &mut Samples,
) -> Result<(), TransportError> {
    let all = WARM_UP + iterations(bytes);
    subject.prepare(bytes);
    let cpu_before = cpu_time();
    // Times of all exchanges, then CPU, in ns.
    let mut own = Vec::with_capacity(all + 1);
    for _ in 0..all {
        subject.between()?;
        meeting.gather(&[0])?;
        let start = Instant::now();
        subject.exchange()?;
        own.push(start.elapsed().as_nanos() as u64);
    }
    let cpu = cpu_before.zip(cpu_time()).map_or(0, |(before, after)| (after - before).as_nanos() as u64);
    own.push(cpu);
    let encoded: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
    let (mut slowest, mut total) = (own, cpu);
    for theirs in meeting.gather(&encoded)? {
        let numbers = theirs.chunks_exact(8).map(|b| <[u8; 8]>::try_from(b).map_or(0, u64::from_le_bytes));
        let numbers: Vec<u64> = numbers.collect();
        total += numbers.last().copied().unwrap_or(0);
        slowest.iter_mut().zip(&numbers).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
    }
    *samples.cpu.get_or_insert_default() += Duration::from_nanos(total);
    samples.exchanges += all;
    samples.times.extend(slowest[WARM_UP..all].iter().map(|time| Duration::from_nanos(*time)));
    Ok(())
}

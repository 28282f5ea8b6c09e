//! Pings between pairs of ranks: what a message takes, what bytes take, what messages take of the processors at both ends.

use super::median;
use crate::EngineError;
use crate::plan::LinkTime;
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, Communicator, cpu_time};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Pings of a pair; the median counts.
const PINGS: usize = 9;
/// Bytes of a ping.
const SMALL: usize = 64;
/// Bytes whose time gives the rate, and how often; the quickest counts, as the first ones open the link's window.
const LARGE: usize = 96 << 10;
const LARGE_RUNS: usize = 4;
/// Messages that are sent one by one, and so far apart that none joins another on its way; and how often so many.
const LONE: usize = 16;
const LONE_RUNS: usize = 3;
const APART: Duration = Duration::from_micros(250);
/// What takes no longer than the clock can tell is as fast as this.
const SHORTEST_S: f64 = 1e-6;
/// How long a peer may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// One end of a pair that pings.
pub(super) struct Post<'a> {
    comm: &'a mut dyn Communicator,
    peer: Rank,
}

impl<'a> Post<'a> {
    pub(super) fn new(comm: &'a mut dyn Communicator, peer: Rank) -> Self {
        Self { comm, peer }
    }

    /// Both ends call this; `first` holds for one of them. Returns what lies from here to the peer.
    pub(super) fn measure(&mut self, first: bool) -> Result<LinkTime, EngineError> {
        if first {
            let link = self.ask()?;
            self.answer()?;
            return Ok(link);
        }
        self.answer()?;
        self.ask()
    }

    fn ask(&mut self) -> Result<LinkTime, EngineError> {
        let mut pings = Vec::new();
        for _ in 0..PINGS {
            pings.push(self.timed(SMALL)?);
        }
        let round_trip = median(pings);
        let mut large = f64::INFINITY;
        for _ in 0..LARGE_RUNS {
            large = large.min(self.timed(LARGE)?);
        }
        Ok(LinkTime {
            latency_s: round_trip / 2.0,
            bytes_per_s: LARGE as f64 / (large - round_trip).max(SHORTEST_S),
            message_s: self.lone()?,
        })
    }

    /// Processor seconds that each of several lone messages takes of either end, the mean: as one follows another by and by,
    /// each is packed, encrypted, waited for and handed over by itself. Whatever else a process does meanwhile counts too and
    /// can only add, so the least of a few runs is it. 0 where the system does not tell.
    fn lone(&mut self) -> Result<f64, EngineError> {
        let mut least = None;
        for _ in 0..LONE_RUNS {
            let before = cpu_time();
            for _ in 0..LONE {
                self.send(Bytes::from_static(&[0; SMALL]))?;
                std::thread::sleep(APART);
            }
            let theirs = Spent::read(&self.receive()?);
            let (Some(ours), Some(theirs)) = (Spent::since(before), theirs) else { continue };
            let both = ours.nanos + if ours.process == theirs.process { 0 } else { theirs.nanos };
            least = Some(least.map_or(both, |least: u64| least.min(both)));
        }
        Ok(least.map_or(0.0, |nanos| 1e-9 * nanos as f64 / (2 * LONE) as f64))
    }

    /// Seconds from a message to its answer.
    fn timed(&mut self, bytes: usize) -> Result<f64, EngineError> {
        let payload = Bytes::from(vec![0_u8; bytes]);
        let began = Instant::now();
        self.send(payload)?;
        self.receive()?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn answer(&mut self) -> Result<(), EngineError> {
        for _ in 0..PINGS + LARGE_RUNS {
            self.receive()?;
            self.send(Bytes::from_static(&[0; SMALL]))?;
        }
        for _ in 0..LONE_RUNS {
            let before = cpu_time();
            for _ in 0..LONE {
                self.receive()?;
            }
            self.send(Spent::since(before).unwrap_or_default().bytes())?;
        }
        Ok(())
    }

    fn send(&mut self, payload: Bytes) -> Result<(), EngineError> {
        Ok(self.comm.send_message(self.peer, ByteClass::Ids, u16::MAX, payload)?)
    }

    /// The peer's next message. Nobody else sends any: all wait for each pair. Late keys and values of sequences that
    /// ended are dropped.
    fn receive(&mut self) -> Result<Bytes, EngineError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.comm.recv_message(left)? {
                Some(message) if message.class == ByteClass::Kv => {}
                Some(message) if message.from == self.peer => return Ok(message.payload),
                Some(message) => {
                    let what = format!("rank {} spoke while {} was measured", message.from, self.peer);
                    return Err(EngineError::Internal(what));
                }
                None => {
                    let what = format!("rank {} did not answer within {PATIENCE:?}", self.peer);
                    return Err(EngineError::Internal(what));
                }
            }
        }
    }
}

/// What a process took of its processors.
#[derive(Default)]
struct Spent {
    /// Which one; both ends of a pair may be in one. 0: it was not told.
    process: u64,
    nanos: u64,
}

impl Spent {
    fn since(before: Option<Duration>) -> Option<Self> {
        let spent = cpu_time()?.saturating_sub(before?);
        Some(Self { process: this_process(), nanos: spent.as_nanos() as u64 })
    }

    fn bytes(&self) -> Bytes {
        Bytes::from([self.process.to_le_bytes(), self.nanos.to_le_bytes()].concat())
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (process, nanos) = (bytes.first_chunk()?, bytes.get(8..)?.first_chunk()?);
        let read = Self { process: u64::from_le_bytes(*process), nanos: u64::from_le_bytes(*nanos) };
        (read.process != 0).then_some(read)
    }
}

/// A number that no other process has, on this or another host, but for an odd chance.
fn this_process() -> u64 {
    static DRAWN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish() | 1);
    *DRAWN
}

/// All pairs of `count` ranks.
pub(super) fn pairings(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}

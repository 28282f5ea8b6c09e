//! Pings between pairs of ranks: what a message takes, what bytes take, what many messages take.

use super::median;
use crate::EngineError;
use crate::plan::LinkTime;
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, Communicator};
use std::time::{Duration, Instant};

/// Pings of a pair; the median counts.
const PINGS: usize = 9;
/// Bytes of a ping.
const SMALL: usize = 64;
/// Bytes whose time gives the rate, and how often; the quickest counts, as the first ones open the link's window.
const LARGE: usize = 96 << 10;
const LARGE_RUNS: usize = 4;
/// Messages sent at once.
const BURST: usize = 32;
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
            pings.push(self.timed(1, SMALL)?);
        }
        let round_trip = median(pings);
        let mut large = f64::INFINITY;
        for _ in 0..LARGE_RUNS {
            large = large.min(self.timed(1, LARGE)?);
        }
        let mut burst = f64::INFINITY;
        for _ in 0..LARGE_RUNS {
            burst = burst.min(self.timed(BURST, SMALL)?);
        }
        Ok(LinkTime {
            latency_s: round_trip / 2.0,
            bytes_per_s: LARGE as f64 / (large - round_trip).max(SHORTEST_S),
            message_s: ((burst - round_trip) / (BURST - 1) as f64).max(0.0),
        })
    }

    /// Seconds from the first of `count` messages to the answer to the last one.
    fn timed(&mut self, count: usize, bytes: usize) -> Result<f64, EngineError> {
        let payload = Bytes::from(vec![0_u8; bytes]);
        let began = Instant::now();
        (0..count).try_for_each(|_| self.send(payload.clone()))?;
        self.receive()?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn answer(&mut self) -> Result<(), EngineError> {
        let answers = PINGS + LARGE_RUNS;
        let counts = std::iter::repeat_n(1, answers).chain(std::iter::repeat_n(BURST, LARGE_RUNS));
        for count in counts {
            (0..count).try_for_each(|_| self.receive())?;
            self.send(Bytes::from_static(&[0; SMALL]))?;
        }
        Ok(())
    }

    fn send(&mut self, payload: Bytes) -> Result<(), EngineError> {
        Ok(self.comm.send_message(self.peer, ByteClass::Ids, u16::MAX, payload)?)
    }

    /// The peer's next message. Nobody else sends any: all wait for each pair. Late keys and values of sequences that
    /// ended are dropped.
    fn receive(&mut self) -> Result<(), EngineError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.comm.recv_message(left)? {
                Some(message) if message.class == ByteClass::Kv => {}
                Some(message) if message.from == self.peer => return Ok(()),
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

/// All pairs of `count` ranks.
pub(super) fn pairings(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}

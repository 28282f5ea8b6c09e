//! What rank 0 has all ranks measure while nothing runs: the links between them, pair by pair, an exchange of all, and
//! each rank's own kernels, first one rank after the other, then all at once.

mod links;

use super::worker::{Event, Worker};
use crate::EngineError;
use crate::plan::{LinkTime, RankTimes, median};
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, RoundId};
use links::{Post, pairings};
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What one rank measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) times: RankTimes,
    /// `[R]` from this rank to each other one.
    pub(crate) links: Vec<LinkTime>,
    /// Seconds of a small exchange.
    pub(crate) exchange_s: f64,
}

/// Pairs of exchanges that are timed, and the bytes to each rank.
const EXCHANGES: usize = 9;
const EXCHANGE_BYTES: usize = 64;
/// Every rank is timed so often, the others in between.
const PASSES: usize = 3;

impl Worker {
    /// Every rank does this at once, with no sequence running.
    pub(super) fn measure(&mut self) -> Result<(), EngineError> {
        let me = self.comm.rank();
        if !self.sequences.running.is_empty() {
            return Err(EngineError::Internal("measured while sequences run".into()));
        }
        let there: Vec<Rank> = (0..self.comm.world_size())
            .map(Rank::from)
            .filter(|rank| !self.comm.absent().contains(rank))
            .collect();
        // A device that still makes the kernels it warms up with takes cores that the first pairs would be charged for.
        self.decoder.gpu.wait();
        self.wait_for_all()?;
        let mut links = vec![LinkTime::default(); self.comm.world_size()];
        for (a, b) in pairings(there.len()) {
            let (a, b) = (there[a], there[b]);
            if let Some(peer) = [b, a].into_iter().find(|peer| [a, b].contains(&me) && *peer != me) {
                links[peer.index()] = Post::new(self.comm.as_mut(), peer).measure(me == a)?;
            }
            // Pairs that ping at once would measure each other.
            self.wait_for_all()?;
        }
        let exchange_s = self.time_exchange()?;
        let mut passes = Vec::new();
        for _ in 0..PASSES {
            let mut times = RankTimes::default();
            for rank in &there {
                if *rank == me {
                    times = self.stepper_for_timing(|stepper| stepper.time_all())?;
                }
                self.wait_for_all()?;
            }
            let together = self.stepper_for_timing(|stepper| stepper.time_one_hop())?;
            let alone = times.hop.coherent.at(super::step::TOGETHER_ROWS);
            times.crowded = if alone > 0.0 { (together / alone).max(1.0) } else { 1.0 };
            self.wait_for_all()?;
            passes.push(times);
        }
        let times = RankTimes::middle(passes);
        self.tell(Event::Measured(me, Box::new(Measured { times, links, exchange_s })));
        Ok(())
    }

    /// The median of a few pairs of exchanges, one after the other: of two ranks that begin a latency apart, one finds in
    /// every second exchange what it waits for, and waits for twice a latency in the next.
    fn time_exchange(&mut self) -> Result<f64, EngineError> {
        let mut seconds = Vec::new();
        for _ in 0..EXCHANGES {
            let began = Instant::now();
            self.exchange_blank(ByteClass::Dispatch, EXCHANGE_BYTES)?;
            self.exchange_blank(ByteClass::Dispatch, EXCHANGE_BYTES)?;
            seconds.push(began.elapsed().as_secs_f64() / 2.0);
        }
        Ok(median(seconds))
    }

    pub(super) fn wait_for_all(&mut self) -> Result<(), EngineError> {
        self.exchange_blank(ByteClass::Ids, 0)
    }

    fn exchange_blank(&mut self, class: ByteClass, bytes: usize) -> Result<(), EngineError> {
        let round = RoundId { number: self.round, class, layer: u16::MAX };
        self.round += 1;
        let send = vec![Bytes::from(vec![0; bytes]); self.comm.world_size()];
        self.comm.exchange(round, send)?;
        Ok(())
    }
}

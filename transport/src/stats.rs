//! Counts of what was sent and received, by peer and class, and of the time spent waiting.

use crate::ByteClass;
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Traffic of one class between a rank and one of its peers, as that rank saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClassStats {
    /// Bytes of payload handed over for sending.
    pub payload_bytes_sent: u64,
    /// Payload and frame headers sent; zero where no wire is involved.
    pub wire_bytes_sent: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Bytes of payload received.
    pub payload_bytes_received: u64,
    /// Payload and frame headers received; zero where no wire is involved.
    pub wire_bytes_received: u64,
    /// Frames received.
    pub frames_received: u64,
}

impl ClassStats {
    fn combine(&mut self, other: &Self, by: impl Fn(u64, u64) -> u64) {
        for (mine, theirs) in [
            (&mut self.payload_bytes_sent, other.payload_bytes_sent),
            (&mut self.wire_bytes_sent, other.wire_bytes_sent),
            (&mut self.frames_sent, other.frames_sent),
            (&mut self.payload_bytes_received, other.payload_bytes_received),
            (&mut self.wire_bytes_received, other.wire_bytes_received),
            (&mut self.frames_received, other.frames_received),
        ] {
            *mine = by(*mine, theirs);
        }
    }
}

/// All that one rank exchanged with one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStats {
    /// The rank that counted.
    pub rank: Rank,
    /// The rank at the other end.
    pub peer: Rank,
    /// By class, in the order of [`ByteClass::ALL`].
    pub classes: [ClassStats; 5],
}

/// Rounds of one rank, by class in the order of [`ByteClass::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundStats {
    /// The rank that counted.
    pub rank: Rank,
    /// Rounds started.
    pub exchanges: [u64; 5],
    /// Time in microseconds for which the rank's thread was blocked in rounds.
    pub wait_us: [u64; 5],
}

/// Bytes, frames, exchanges and waiting times since a communicator was made.
///
/// One communicator's statistics name itself as the rank of every entry; those of several ranks can be merged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WireStats {
    /// One entry per (rank, peer), in that order.
    pub links: Vec<LinkStats>,
    /// One entry per rank, in order.
    pub rounds: Vec<RoundStats>,
}

impl WireStats {
    /// Zeroes, for `rank` in a world of `world_size`.
    pub fn new(rank: Rank, world_size: usize) -> Self {
        let peers = (0..world_size).map(Rank::from).filter(|peer| *peer != rank);
        Self {
            links: peers.map(|peer| LinkStats { rank, peer, classes: Default::default() }).collect(),
            rounds: vec![RoundStats { rank, exchanges: [0; 5], wait_us: [0; 5] }],
        }
    }

    /// Adds another rank's counts, or further counts of the same rank.
    pub fn merge(&mut self, other: &Self) {
        self.combine(other, u64::saturating_add);
    }

    /// What was counted since `earlier`, an older copy of the same statistics.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut delta = self.clone();
        delta.combine(earlier, u64::saturating_sub);
        delta
    }

    fn combine(&mut self, other: &Self, by: impl Fn(u64, u64) -> u64 + Copy) {
        for theirs in &other.links {
            let link = self.link_mut(theirs.rank, theirs.peer);
            link.classes.iter_mut().zip(&theirs.classes).for_each(|(mine, theirs)| mine.combine(theirs, by));
        }
        for theirs in &other.rounds {
            let mine = self.rounds_mut(theirs.rank);
            for class in 0..5 {
                mine.exchanges[class] = by(mine.exchanges[class], theirs.exchanges[class]);
                mine.wait_us[class] = by(mine.wait_us[class], theirs.wait_us[class]);
            }
        }
    }

    /// Traffic of a class over all links, at the ranks that are part of these statistics.
    pub fn class(&self, class: ByteClass) -> ClassStats {
        let mut sum = ClassStats::default();
        self.links.iter().for_each(|link| sum.combine(&link.classes[class as usize], u64::saturating_add));
        sum
    }

    /// Traffic of a class between `rank` and `peer`, as `rank` counted it.
    pub fn between(&self, rank: Rank, peer: Rank, class: ByteClass) -> ClassStats {
        let link = self.links.iter().find(|link| link.rank == rank && link.peer == peer);
        link.map_or_else(ClassStats::default, |link| link.classes[class as usize])
    }

    /// Exchanges of a class: the most that any one rank has started, as each exchange involves every rank.
    pub fn exchanges(&self, class: ByteClass) -> u64 {
        self.rounds.iter().map(|rounds| rounds.exchanges[class as usize]).max().unwrap_or(0)
    }

    /// Time for which ranks were blocked in rounds of a class, summed over the ranks.
    pub fn wait(&self, class: ByteClass) -> Duration {
        Duration::from_micros(self.rounds.iter().map(|rounds| rounds.wait_us[class as usize]).sum())
    }

    pub(crate) fn count_sent(
        &mut self,
        rank: Rank,
        peer: Rank,
        class: ByteClass,
        payload: usize,
        header: usize,
    ) {
        let counts = &mut self.link_mut(rank, peer).classes[class as usize];
        counts.payload_bytes_sent += payload as u64;
        counts.wire_bytes_sent += wire_bytes(payload, header);
        counts.frames_sent += 1;
    }

    pub(crate) fn count_received(
        &mut self,
        rank: Rank,
        peer: Rank,
        class: ByteClass,
        payload: usize,
        header: usize,
    ) {
        let counts = &mut self.link_mut(rank, peer).classes[class as usize];
        counts.payload_bytes_received += payload as u64;
        counts.wire_bytes_received += wire_bytes(payload, header);
        counts.frames_received += 1;
    }

    pub(crate) fn count_exchange(&mut self, rank: Rank, class: ByteClass) {
        self.rounds_mut(rank).exchanges[class as usize] += 1;
    }

    pub(crate) fn count_wait(&mut self, rank: Rank, class: ByteClass, wait: Duration) {
        self.rounds_mut(rank).wait_us[class as usize] += wait.as_micros() as u64;
    }

    fn link_mut(&mut self, rank: Rank, peer: Rank) -> &mut LinkStats {
        let at = self.links.binary_search_by_key(&(rank, peer), |link| (link.rank, link.peer));
        let at = at.unwrap_or_else(|at| {
            self.links.insert(at, LinkStats { rank, peer, classes: Default::default() });
            at
        });
        &mut self.links[at]
    }

    fn rounds_mut(&mut self, rank: Rank) -> &mut RoundStats {
        let at = self.rounds.binary_search_by_key(&rank, |rounds| rounds.rank).unwrap_or_else(|at| {
            self.rounds.insert(at, RoundStats { rank, exchanges: [0; 5], wait_us: [0; 5] });
            at
        });
        &mut self.rounds[at]
    }
}

/// A header of zero bytes stands for "no wire".
fn wire_bytes(payload: usize, header: usize) -> u64 {
    if header == 0 { 0 } else { (payload + header) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_ranks_apart_and_adds_the_same_rank() {
        let mut first = WireStats::new(Rank(0), 2);
        first.count_sent(Rank(0), Rank(1), ByteClass::Dispatch, 100, 40);
        first.count_exchange(Rank(0), ByteClass::Dispatch);
        let mut second = WireStats::new(Rank(1), 2);
        second.count_received(Rank(1), Rank(0), ByteClass::Dispatch, 100, 40);
        second.count_exchange(Rank(1), ByteClass::Dispatch);
        let mut both = second.clone();
        both.merge(&first);
        assert_eq!(both.between(Rank(0), Rank(1), ByteClass::Dispatch).wire_bytes_sent, 140);
        assert_eq!(both.between(Rank(1), Rank(0), ByteClass::Dispatch).payload_bytes_received, 100);
        assert_eq!(both.exchanges(ByteClass::Dispatch), 1);
        let earlier = both.clone();
        both.merge(&first);
        assert_eq!(both.since(&earlier).class(ByteClass::Dispatch).frames_sent, 1);
        assert_eq!(both.since(&earlier).class(ByteClass::Dispatch).frames_received, 0);
    }
}

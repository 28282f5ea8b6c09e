//! Who is silent: heartbeats between the processes of a world, and what rank 0 makes of them.
//!
//! Every process tells every other one, each [`BEAT`], whom it has not heard for [`SUSPECT_AFTER`]. What rank 0 tells is
//! its own view and what the others told it, so that a silence that anybody notices is known to all who can hear rank
//! 0. Suspicion loses nobody: that is decided by the connections' idle timeout. It says early where to look.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// Time between two heartbeats.
pub const BEAT: Duration = Duration::from_millis(200);
/// A process that is not heard for this long is suspect.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(1);
/// Most suspects that a heartbeat names, so that it stays a small message.
const MOST_NAMED: usize = 1024;

/// What is said with each heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Beat {
    /// Processes that the sender suspects or, from rank 0, that anybody suspects.
    pub suspects: Vec<u16>,
}

impl Beat {
    /// The heartbeat as bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Plain data into a growing buffer: there is nothing that could fail.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Reads a heartbeat; bytes left over make it unreadable.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(bytes) {
            Ok((beat, [])) => Some(beat),
            _ => None,
        }
    }
}

/// A process whose state has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Its number.
    pub process: usize,
    /// Whether it is suspect now.
    pub suspect: bool,
}

#[derive(Debug)]
struct Peer {
    heard: Duration,
    silent: bool,
    /// What it told last.
    suspects: BTreeSet<u16>,
}

/// One process's view of the others.
#[derive(Debug)]
pub struct Pulse {
    own: usize,
    /// By process; none for this one and absent ones.
    peers: Vec<Option<Peer>>,
    looked: Duration,
    known: BTreeSet<u16>,
}

impl Pulse {
    /// The view of process `own` at `now`, when all of `present` were heard.
    pub fn new(own: usize, present: impl IntoIterator<Item = bool>, now: Duration) -> Self {
        let fresh = || Peer { heard: now, silent: false, suspects: BTreeSet::new() };
        let peers = present.into_iter().enumerate();
        let peers = peers.map(|(at, there)| (there && at != own).then(fresh)).collect();
        Self { own, peers, looked: now, known: BTreeSet::new() }
    }

    /// Takes a peer's heartbeat.
    pub fn hear(&mut self, from: usize, beat: Beat, now: Duration) -> Vec<Change> {
        let processes = self.peers.len();
        if let Some(Some(peer)) = self.peers.get_mut(from) {
            peer.heard = now;
            peer.silent = false;
            let named = beat.suspects.into_iter().filter(|process| usize::from(*process) < processes);
            peer.suspects = named.take(MOST_NAMED).collect();
        }
        self.changes()
    }

    /// Looks who is silent; to be called once a [`BEAT`]. If it was not, this process was held up itself: the others may
    /// have spoken meanwhile, so that time does not count against them.
    pub fn look(&mut self, now: Duration) -> Vec<Change> {
        let held_up = now.saturating_sub(self.looked).saturating_sub(2 * BEAT);
        self.looked = now;
        for peer in self.peers.iter_mut().flatten() {
            peer.heard = (peer.heard + held_up).min(now);
            peer.silent = now - peer.heard >= SUSPECT_AFTER;
        }
        self.changes()
    }

    /// What is to be told with the next heartbeat.
    pub fn beat(&self) -> Beat {
        let all = if self.own == 0 { self.known.clone() } else { self.silent().collect() };
        Beat { suspects: all.into_iter().take(MOST_NAMED).collect() }
    }

    /// Every process that is suspect.
    pub fn suspects(&self) -> &BTreeSet<u16> {
        &self.known
    }

    fn silent(&self) -> impl Iterator<Item = u16> + '_ {
        let peers = self.peers.iter().enumerate();
        peers.filter(|(_, peer)| peer.as_ref().is_some_and(|peer| peer.silent)).map(|(at, _)| at as u16)
    }

    fn changes(&mut self) -> Vec<Change> {
        // Rank 0 believes everybody whom it hears; the others believe rank 0.
        let believed = |at: usize| self.own == 0 || at == 0;
        let heard = self.peers.iter().enumerate().filter(|(at, _)| believed(*at));
        let told = heard.filter_map(|(_, peer)| peer.as_ref().filter(|peer| !peer.silent));
        let now: BTreeSet<u16> =
            self.silent().chain(told.flat_map(|peer| peer.suspects.iter().copied())).collect();
        let change = |suspect| move |process: &u16| Change { process: usize::from(*process), suspect };
        let changes = now.difference(&self.known).map(change(true));
        let changes = changes.chain(self.known.difference(&now).map(change(false))).collect();
        self.known = now;
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Processes in virtual time.
    struct Net {
        pulses: Vec<Pulse>,
        now: Duration,
        /// (from, to): nothing gets through.
        cut: Vec<(usize, usize)>,
        told: Vec<(usize, Change)>,
    }

    impl Net {
        fn new(n: usize) -> Self {
            let pulses = (0..n).map(|own| Pulse::new(own, vec![true; n], Duration::ZERO)).collect();
            Self { pulses, now: Duration::ZERO, cut: Vec::new(), told: Vec::new() }
        }

        fn run(&mut self, beats: usize) {
            for _ in 0..beats {
                self.now += BEAT;
                let n = self.pulses.len();
                let mut said: Vec<Vec<(usize, Change)>> = Vec::new();
                for at in 0..n {
                    said.push(self.pulses[at].look(self.now).into_iter().map(|c| (at, c)).collect());
                }
                for (from, to) in (0..n).flat_map(|from| (0..n).map(move |to| (from, to))) {
                    if from != to && !self.cut.contains(&(from, to)) {
                        let beat = Beat::decode(&self.pulses[from].beat().encode()).expect("a beat");
                        let changes = self.pulses[to].hear(from, beat, self.now);
                        said.push(changes.into_iter().map(|c| (to, c)).collect());
                    }
                }
                self.told.extend(said.into_iter().flatten());
            }
        }

        fn views(&self) -> Vec<Vec<u16>> {
            self.pulses.iter().map(|pulse| pulse.suspects().iter().copied().collect()).collect()
        }
    }

    #[test]
    fn a_silence_that_one_notices_is_known_to_all_and_so_is_its_end() {
        let mut net = Net::new(4);
        net.run(20);
        assert!(net.told.is_empty(), "{:?}", net.told);
        // 3 does not hear 2: only 3 can notice, and rank 0 tells.
        net.cut = vec![(2, 3)];
        net.run(4);
        assert!(net.told.is_empty(), "not before a second has passed");
        net.run(3);
        assert_eq!(net.views(), [[2], [2], [2], [2]]);
        net.cut.clear();
        net.run(2);
        assert_eq!(net.views(), vec![Vec::<u16>::new(); 4]);
        let of = |at: usize| {
            net.told.iter().filter(|(to, _)| *to == at).map(|(_, c)| c.suspect).collect::<Vec<_>>()
        };
        assert!((0..4).all(|at| of(at) == [true, false]), "each is told once: {:?}", net.told);
    }

    #[test]
    fn a_process_that_was_held_up_itself_suspects_nobody() {
        let mut pulse = Pulse::new(1, [true; 3], Duration::ZERO);
        assert!(pulse.look(BEAT).is_empty());
        // Five seconds in which it did not run, as after a SIGSTOP.
        assert!(pulse.look(Duration::from_secs(5)).is_empty());
        assert!(pulse.look(Duration::from_secs(5) + BEAT).is_empty());
        // From then on, silence counts.
        let late: Vec<_> = (2..8).flat_map(|n| pulse.look(Duration::from_secs(5) + n * BEAT)).collect();
        assert_eq!(late.len(), 2);
    }

    #[test]
    fn absent_and_made_up_processes_are_never_suspect() {
        let mut pulse = Pulse::new(0, [true, true, false], Duration::ZERO);
        assert!(pulse.hear(1, Beat { suspects: vec![9, 77] }, BEAT).is_empty());
        assert!(pulse.hear(2, Beat::default(), BEAT).is_empty());
        let changes: Vec<_> = (1..8).flat_map(|n| pulse.look(n * BEAT)).collect();
        assert_eq!(changes, [Change { process: 1, suspect: true }]);
    }

    proptest! {
        #[test]
        fn views_agree_once_cuts_have_lasted_or_healed(
            cuts in proptest::collection::vec((0_usize..5, 0_usize..5), 0..6),
            heal in any::<bool>(),
        ) {
            let mut net = Net::new(5);
            net.run(3);
            // Ways from and to rank 0 stay: through it all is known.
            net.cut = cuts.into_iter().filter(|(from, to)| from != to && *from != 0 && *to != 0).collect();
            net.run(12);
            let suspects: BTreeSet<u16> = net.cut.iter().map(|(from, _)| *from as u16).collect();
            if heal { net.cut.clear(); net.run(3); }
            let expected: Vec<u16> = if heal { vec![] } else { suspects.into_iter().collect() };
            prop_assert!(net.views().iter().all(|view| *view == expected), "{:?} {:?}", net.views(), expected);
        }
    }
}

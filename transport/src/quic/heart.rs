//! Heartbeats of one life of a world, on the driver: whoever waits for a GPU does not hold them up.

use super::options::{JoinEvent, JoinOptions};
use crate::proto::membership::{Member, Roster};
use crate::proto::pulse::{BEAT, Beat, Change, Pulse};
use exflow_placement::Rank;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// The ranks that are suspect now, to be looked at from any thread: nothing was heard from them for a second, by this
/// process or, as rank 0 tells, by any other.
#[derive(Debug, Clone, Default)]
pub struct Suspects(Arc<Mutex<BTreeSet<Rank>>>);

impl Suspects {
    /// The ranks, in order.
    pub fn ranks(&self) -> Vec<Rank> {
        self.lock().iter().copied().collect()
    }

    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<Rank>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The heartbeats of a process.
pub(crate) struct Heart {
    pulse: Mutex<Pulse>,
    /// Of the pulse's time.
    born: Instant,
    /// What the writers of the control streams send; sent anew for every beat.
    beats: watch::Sender<Beat>,
    roster: Roster,
    options: Arc<JoinOptions>,
    suspects: Suspects,
}

impl Heart {
    pub(crate) fn new(roster: &Roster, options: &Arc<JoinOptions>, suspects: &Suspects) -> Self {
        let present = (0..roster.members().len()).map(|process| roster.is_present(process));
        let pulse = Pulse::new(options.rank.index(), present, std::time::Duration::ZERO);
        suspects.clear();
        Self {
            pulse: Mutex::new(pulse),
            born: Instant::now(),
            beats: watch::Sender::new(Beat::default()),
            roster: roster.clone(),
            options: Arc::clone(options),
            suspects: suspects.clone(),
        }
    }

    /// What a writer is to send, whenever it changes.
    pub(crate) fn beats(&self) -> watch::Receiver<Beat> {
        self.beats.subscribe()
    }

    /// Beats until aborted; not at all where [`QuicOptions::heartbeats`](super::QuicOptions) says so.
    pub(crate) async fn run(self: Arc<Self>) {
        if !self.options.quic.heartbeats {
            return;
        }
        let mut ticks = tokio::time::interval(BEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let mut pulse = self.pulse();
            let changes = pulse.look(self.born.elapsed());
            self.beats.send_replace(pulse.beat());
            drop(pulse);
            self.tell(&changes);
        }
    }

    /// Takes the heartbeat of a process.
    pub(crate) fn hear(&self, process: usize, beat: Beat) {
        let mut pulse = self.pulse();
        let changes = pulse.hear(process, beat, self.born.elapsed());
        if !changes.is_empty() {
            self.beats.send_replace(pulse.beat());
        }
        drop(pulse);
        self.tell(&changes);
    }

    fn pulse(&self) -> MutexGuard<'_, Pulse> {
        self.pulse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, changes: &[Change]) {
        for change in changes {
            let ranks: Vec<Rank> =
                self.roster.members().get(change.process).into_iter().flat_map(Member::ranks).collect();
            let mut suspects = self.suspects.lock();
            match change.suspect {
                true => suspects.extend(&ranks),
                false => suspects.retain(|rank| !ranks.contains(rank)),
            }
            drop(suspects);
            match change.suspect {
                true => tracing::warn!(rank = %self.options.rank, suspects = ?ranks, "silent for a second"),
                false => tracing::info!(rank = %self.options.rank, heard = ?ranks, "heard again"),
            }
            self.options.tell(&match change.suspect {
                true => JoinEvent::Suspect { ranks },
                false => JoinEvent::Heard { ranks },
            });
        }
    }
}

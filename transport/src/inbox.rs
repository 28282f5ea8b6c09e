//! Where a driver's thread and a rank's thread meet: the state of the rounds, what has arrived, the counts.

use crate::proto::round::{FramesPoll, RoundFailure, RoundLimits, RoundPoll, Rounds};
use crate::{Arrivals, ByteClass, RoundId, TransportError, WireStats};
use bytes::Bytes;
use exflow_placement::Rank;
use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

mod arrivals;
mod messages;

/// One rank's mailbox.
#[derive(Debug)]
pub(crate) struct Inbox {
    rank: Rank,
    born: Instant,
    limits: InboxLimits,
    /// By peer: bytes of messages that wait for the driver.
    unsent_messages: Vec<AtomicUsize>,
    state: Mutex<State>,
    /// For the rank's thread: something that it may wait for has happened.
    arrived: Condvar,
    /// The same for a rank's thread that drives its own sockets while it waits.
    arrived_here: Notify,
    /// For readers that hold a frame back: there may be room now.
    room: Notify,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct InboxLimits {
    pub(crate) rounds: RoundLimits,
    /// Unread background bytes per peer before its bulk stream is no longer read.
    pub(crate) bulk_unread_bytes: usize,
    /// Unsent background bytes per peer before `send_bulk` waits.
    pub(crate) bulk_unsent_bytes: usize,
    /// Unsent bytes of messages per peer before it is given up.
    pub(crate) messages_unsent_bytes: usize,
    /// Bytes of header that each frame adds on the wire; zero without a wire.
    pub(crate) header_bytes: usize,
}

#[derive(Debug)]
struct State {
    rounds: Rounds,
    bulk: VecDeque<(Rank, Bytes)>,
    messages: messages::Messages,
    unread: Vec<usize>,
    /// By peer: whether a bulk stream of its own may still bring something.
    bulk_coming: Vec<bool>,
    unsent: Vec<usize>,
    /// By peer: whether it is in this process, so that nothing between us and it is on a wire.
    here: Vec<bool>,
    stats: WireStats,
    holding: usize,
    closed: bool,
}

impl Inbox {
    pub(crate) fn new(rank: Rank, world: usize, limits: InboxLimits) -> Self {
        let state = State {
            rounds: Rounds::new(rank, world, limits.rounds),
            bulk: VecDeque::new(),
            messages: messages::Messages::new(world),
            unread: vec![0; world],
            bulk_coming: vec![false; world],
            unsent: vec![0; world],
            here: vec![false; world],
            stats: WireStats::new(rank, world),
            holding: 0,
            closed: false,
        };
        Self {
            rank,
            born: Instant::now(),
            limits,
            unsent_messages: (0..world).map(|_| AtomicUsize::new(0)).collect(),
            state: Mutex::new(state),
            arrived: Condvar::new(),
            arrived_here: Notify::new(),
            room: Notify::new(),
        }
    }

    /// Does without these ranks in this epoch.
    pub(crate) fn set_absent(&self, ranks: &[Rank]) {
        self.lock().rounds.set_absent(ranks);
    }

    /// These ranks are in this process.
    pub(crate) fn set_here(&self, ranks: impl Iterator<Item = Rank>) {
        let mut state = self.lock();
        ranks.for_each(|rank| state.here[rank.index()] = true);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.born.elapsed()
    }

    // What the rank's thread calls.

    /// Starts a round: checks the payloads, keeps this rank's own, counts those for the others and puts them into
    /// `outgoing`, beginning with this rank's successor, so that not all ranks send to the same one first.
    pub(crate) fn start(
        &self,
        round: RoundId,
        mut send: Vec<Bytes>,
        outgoing: &mut Vec<(Rank, Bytes)>,
    ) -> Result<(), TransportError> {
        let mut state = self.lock();
        self.check_open(&state)?;
        self.check_payloads(&state, &send)?;
        state.rounds.check_start(round).map_err(|error| self.misuse(error.to_string()))?;
        let (me, world) = (self.rank.index(), send.len());
        for to in (me + 1..world).chain(0..me).map(Rank::from) {
            if !state.rounds.is_absent(to) {
                let payload = std::mem::take(&mut send[to.index()]);
                self.count(&mut state, to, round.class, true, payload.len());
                outgoing.push((to, payload));
            }
        }
        let own = std::mem::take(&mut send[me]);
        state.rounds.spare(send);
        state.stats.count_exchange(self.rank, round.class);
        state.rounds.start(round, own, self.now()).map_err(|error| self.misuse(error.to_string()))?;
        let wake = state.holding > 0;
        drop(state);
        if wake {
            self.room.notify_waiters();
        }
        Ok(())
    }

    /// Waits for a started round.
    pub(crate) fn finish(&self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            let wait = match self.look(&mut state, round) {
                Ok(result) => {
                    state.stats.count_wait(self.rank, round.class, began.elapsed());
                    return result;
                }
                Err(wait) => wait,
            };
            state = self.arrived.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Frames of a started round that have come; with `wait` waits for one where there is none.
    pub(crate) fn arrivals(&self, round: RoundId, wait: bool) -> Result<Arrivals, TransportError> {
        let began = Instant::now();
        let mut state = self.lock();
        let result = loop {
            if state.closed {
                break Err(TransportError::Closed { rank: self.rank });
            }
            let now = self.now();
            let left = match state.rounds.poll_frames(round.number, now) {
                FramesPoll::Some(arrivals) => break Ok(arrivals),
                FramesPoll::Failed(failure) => break Err(self.error(failure, Some(round))),
                FramesPoll::Pending { .. } if !wait => break Ok(Arrivals::default()),
                FramesPoll::Pending { deadline } => deadline.saturating_sub(now),
            };
            state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.stats.count_wait(self.rank, round.class, began.elapsed());
        result
    }

    /// [`Inbox::finish`] for a thread that drives the sockets itself.
    pub(crate) async fn finish_here(&self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        let began = Instant::now();
        // Where all others' frames have come already, this rank's must leave before it stops driving.
        tokio::task::yield_now().await;
        loop {
            let arrived = self.arrived_here.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            let wait = {
                let mut state = self.lock();
                match self.look(&mut state, round) {
                    Ok(result) => {
                        state.stats.count_wait(self.rank, round.class, began.elapsed());
                        return result;
                    }
                    Err(wait) => wait,
                }
            };
            // Both ways, the round is looked at again.
            let _ = tokio::time::timeout(wait, arrived).await;
        }
    }

    /// What has become of a round, or how long it may still be waited for.
    fn look(
        &self,
        state: &mut State,
        round: RoundId,
    ) -> Result<Result<Vec<Bytes>, TransportError>, Duration> {
        if state.closed {
            return Ok(Err(TransportError::Closed { rank: self.rank }));
        }
        let now = self.now();
        match state.rounds.poll(round.number, now) {
            RoundPoll::Ready(payloads) => Ok(Ok(payloads)),
            RoundPoll::Failed(failure) => Ok(Err(self.error(failure, Some(round)))),
            RoundPoll::Pending { deadline } => Err(deadline.saturating_sub(now)),
        }
    }

    fn wake(&self) {
        self.arrived.notify_all();
        self.arrived_here.notify_waiters();
    }

    /// Waits until the backlog towards `to` has room, then counts `bytes` into it.
    pub(crate) fn reserve_bulk(&self, to: Rank, bytes: usize) -> Result<(), TransportError> {
        let mut state = self.lock();
        self.check_open(&state)?;
        if to.index() >= state.unsent.len() || to == self.rank {
            return Err(self.misuse(format!("background bytes for rank {to}, which is not a peer")));
        }
        if bytes > self.limits.rounds.max_frame_bytes as usize {
            return Err(self.over_cap(bytes));
        }
        let (began, limit_bytes) = (Instant::now(), self.limits.bulk_unsent_bytes);
        while state.unsent[to.index()] > 0 && state.unsent[to.index()] + bytes > limit_bytes {
            if let Some(failure) = state.rounds.first_failure() {
                return Err(self.error(failure, None));
            }
            let waited = began.elapsed();
            let Some(left) = self.limits.rounds.timeout.checked_sub(waited).filter(|left| !left.is_zero())
            else {
                let waiting_bytes = state.unsent[to.index()];
                return Err(TransportError::Backlog {
                    rank: self.rank,
                    peer: to,
                    waiting_bytes,
                    limit_bytes,
                    waited,
                });
            };
            state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            self.check_open(&state)?;
        }
        state.unsent[to.index()] += bytes;
        self.count(&mut state, to, ByteClass::Kv, true, bytes);
        Ok(())
    }

    /// The next background payload; waits up to `timeout`. What has arrived is given out before any failure.
    pub(crate) fn recv_bulk(&self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some((peer, payload)) = state.bulk.pop_front() {
                state.unread[peer.index()] -= payload.len();
                if state.holding > 0 {
                    self.room.notify_waiters();
                }
                return Ok(Some((peer, payload)));
            }
            self.check_open(&state)?;
            if let Some(failure) = state.rounds.first_failure() {
                return Err(self.error(failure, None));
            }
            let Some(left) = timeout.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return Ok(None);
            };
            state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Background bytes counted by [`Inbox::reserve_bulk`] that have not left yet.
    pub(crate) fn unsent_bulk(&self, to: Rank) -> usize {
        self.lock().unsent.get(to.index()).copied().unwrap_or(0)
    }

    pub(crate) fn stats(&self) -> WireStats {
        self.lock().stats.clone()
    }

    /// The first failure so far, as this rank would report it.
    pub(crate) fn failure(&self) -> Option<TransportError> {
        let failure = self.lock().rounds.first_failure();
        failure.map(|failure| self.error(failure, None))
    }

    // Errors.

    fn check_open(&self, state: &State) -> Result<(), TransportError> {
        if state.closed { Err(TransportError::Closed { rank: self.rank }) } else { Ok(()) }
    }

    fn check_payloads(&self, state: &State, send: &[Bytes]) -> Result<(), TransportError> {
        let world = state.unsent.len();
        if send.len() != world {
            return Err(self.misuse(format!("{} payloads for {world} ranks", send.len())));
        }
        let cap = self.limits.rounds.max_frame_bytes as usize;
        let longest =
            send.iter().enumerate().filter(|(to, _)| *to != self.rank.index()).map(|(_, p)| p.len()).max();
        match longest {
            Some(bytes) if bytes > cap => Err(self.over_cap(bytes)),
            _ => Ok(()),
        }
    }

    fn over_cap(&self, bytes: usize) -> TransportError {
        let cap = self.limits.rounds.max_frame_bytes;
        self.misuse(format!("a payload of {bytes} bytes, over the agreed {cap} (raise max_frame_bytes)"))
    }

    fn misuse(&self, what: String) -> TransportError {
        TransportError::Misuse { rank: self.rank, what }
    }

    fn error(&self, failure: RoundFailure, round: Option<RoundId>) -> TransportError {
        let rank = self.rank;
        match (failure, round) {
            (RoundFailure::Lost(peer, cause), round) => TransportError::PeerLost { rank, peer, round, cause },
            (RoundFailure::Broken(peer, violation), round) => {
                TransportError::Protocol { rank, peer, round, violation }
            }
            (RoundFailure::Timeout { missing, waited }, Some(round)) => {
                TransportError::RoundTimeout { rank, round, missing, waited }
            }
            (RoundFailure::NotOpen | RoundFailure::Timeout { .. }, round) => {
                let round = round.map_or_else(String::new, |round| round.to_string());
                self.misuse(format!("{round} is not open"))
            }
        }
    }
}

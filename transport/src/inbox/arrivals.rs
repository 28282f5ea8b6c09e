//! What a driver hands to an inbox, and what it asks before.

use super::{Inbox, State};
use crate::proto::round::{Admission, Violation};
use crate::{ByteClass, LossCause, RoundId};
use bytes::Bytes;
use exflow_placement::Rank;

impl Inbox {
    /// Decides about a round frame by its header; waits for room.
    pub(crate) async fn admit_when_possible(
        &self,
        peer: Rank,
        round: RoundId,
        length: u32,
    ) -> Result<(), Violation> {
        self.when_room(|state| match state.rounds.admit(peer, round, length) {
            Ok(Admission::Take) => Some(Ok(())),
            Ok(Admission::Hold) => None,
            Err(violation) => Some(Err(violation)),
        })
        .await
    }

    /// Waits until `bytes` more background bytes of `peer` may be kept.
    pub(crate) async fn bulk_room(&self, peer: Rank, bytes: usize) {
        let limit = self.limits.bulk_unread_bytes;
        self.when_room(|state| {
            let unread = state.unread[peer.index()];
            (unread == 0 || unread + bytes <= limit).then_some(())
        })
        .await;
    }

    pub(super) async fn when_room<T>(&self, mut ask: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut held = false;
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            {
                let mut state = self.lock();
                if let Some(answer) = ask(&mut state) {
                    state.holding -= usize::from(held);
                    return answer;
                }
                state.holding += usize::from(!held);
                held = true;
                room.as_mut().enable();
            }
            room.await;
        }
    }

    /// Stores an admitted frame's payload and wakes the rank if that completes an open round.
    pub(crate) fn deliver(&self, peer: Rank, round: RoundId, payload: Bytes) {
        let mut state = self.lock();
        self.count(&mut state, peer, round.class, false, payload.len());
        let complete = state.rounds.deliver(peer, round.number, payload);
        drop(state);
        if complete {
            self.wake();
        }
    }

    /// Takes a frame of a rank of this process.
    pub(crate) fn take_here(&self, peer: Rank, round: RoundId, payload: Bytes) {
        let mut state = self.lock();
        self.count(&mut state, peer, round.class, false, payload.len());
        match state.rounds.take_here(peer, round, payload) {
            Ok(false) => return,
            Ok(true) => {}
            Err(violation) => state.rounds.break_peer(peer, violation),
        }
        drop(state);
        self.wake();
    }

    pub(crate) fn deliver_bulk(&self, peer: Rank, payload: Bytes) {
        let mut state = self.lock();
        self.count(&mut state, peer, ByteClass::Kv, false, payload.len());
        state.unread[peer.index()] += payload.len();
        state.bulk.push_back((peer, payload));
        drop(state);
        self.wake();
    }

    /// Notes whether a stream of background bytes of `peer` is open.
    pub(crate) fn bulk_coming(&self, peer: Rank, coming: bool) {
        self.lock().bulk_coming[peer.index()] = coming;
        self.wake();
    }

    /// Notes that background bytes towards `to` have left.
    pub(crate) fn bulk_sent(&self, to: Rank, bytes: usize) {
        let mut state = self.lock();
        state.unsent[to.index()] -= bytes;
        drop(state);
        self.wake();
    }

    pub(crate) fn count_control(&self, peer: Rank, sent: bool, payload: usize) {
        self.count(&mut self.lock(), peer, ByteClass::Control, sent, payload);
    }

    pub(super) fn count(&self, state: &mut State, peer: Rank, class: ByteClass, sent: bool, payload: usize) {
        let header = if state.here[peer.index()] { 0 } else { self.limits.header_bytes };
        match sent {
            true => state.stats.count_sent(self.rank, peer, class, payload, header),
            false => state.stats.count_received(self.rank, peer, class, payload, header),
        }
    }

    pub(crate) fn lose_peer(&self, peer: Rank, cause: LossCause) {
        self.lock().rounds.lose_peer(peer, cause);
        self.wake();
    }

    pub(crate) fn break_peer(&self, peer: Rank, violation: Violation) {
        self.lock().rounds.break_peer(peer, violation);
        self.wake();
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake();
    }
}

//! Point-to-point messages, outside all rounds: ordered per peer, on the same stream as rounds.

use super::{Inbox, State};
use crate::proto::round::Violation;
use crate::{ByteClass, LossCause, Message, TransportError};
use bytes::Bytes;
use exflow_placement::Rank;
use std::collections::VecDeque;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What has arrived of messages, and how far each peer has counted.
#[derive(Debug)]
pub(super) struct Messages {
    arrived: VecDeque<Message>,
    /// Bytes not read yet, by peer.
    unread: Vec<usize>,
    /// Number of the next message, by peer: to it, from it.
    next: Vec<(u64, u64)>,
}

impl Messages {
    pub(super) fn new(world: usize) -> Self {
        Self { arrived: VecDeque::new(), unread: vec![0; world], next: vec![(0, 0); world] }
    }
}

impl Inbox {
    /// Counts a message for `to`; gives its number. Never waits: what a rank sends must not depend on what others
    /// read.
    pub(crate) fn send_message(
        &self,
        to: Rank,
        class: ByteClass,
        bytes: usize,
    ) -> Result<u64, TransportError> {
        let mut state = self.lock();
        self.check_open(&state)?;
        if to.index() >= state.unsent.len() || to == self.rank {
            return Err(self.misuse(format!("a message for rank {to}, which is not a peer")));
        }
        if !class.is_round() {
            return Err(self.misuse(format!("a message of class {class}, which has a stream of its own")));
        }
        if bytes > self.limits.rounds.max_frame_bytes as usize {
            return Err(self.over_cap(bytes));
        }
        if let Some(failure) = state.rounds.first_failure() {
            return Err(self.error(failure, None));
        }
        self.count(&mut state, to, class, true, bytes);
        let next = &mut state.messages.next[to.index()].0;
        *next += 1;
        Ok(*next - 1)
    }

    /// Counts a message for `to` that the driver is to send. A peer that lets so many wait is given up: to wait for it would
    /// make sending depend on what others read, and to go on would let it fill this rank's memory.
    pub(crate) fn queue_message(&self, to: Rank, bytes: usize) -> Result<(), TransportError> {
        let Some(unsent) = self.unsent_messages.get(to.index()) else { return Ok(()) };
        let limit_bytes = self.limits.messages_unsent_bytes;
        let before = unsent.fetch_add(bytes, Ordering::Relaxed);
        let waiting_bytes = before.saturating_add(bytes);
        if before == 0 || waiting_bytes <= limit_bytes {
            return Ok(());
        }
        unsent.fetch_sub(bytes, Ordering::Relaxed);
        self.lose_peer(to, LossCause::Unread { waiting_bytes, limit_bytes });
        self.failure().map_or(Ok(()), Err)
    }

    /// Notes that the driver has taken a message for `to`.
    pub(crate) fn message_sent(&self, to: Rank, bytes: usize) {
        if let Some(unsent) = self.unsent_messages.get(to.index()) {
            unsent.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// The next message, or else the next background payload; waits up to `timeout`. What has arrived is given out
    /// before any failure; a peer that left is one here, as nobody waits for anybody's round.
    pub(crate) fn recv_message(&self, timeout: Duration) -> Result<Option<Message>, TransportError> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(message) = self.next_message(&mut state) {
                return Ok(Some(message));
            }
            self.check_open(&state)?;
            if let Some(failure) = state.rounds.first_gone(|peer| state.bulk_coming[peer.index()]) {
                return Err(self.error(failure, None));
            }
            let Some(left) = timeout.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return Ok(None);
            };
            state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn next_message(&self, state: &mut State) -> Option<Message> {
        let message = match state.messages.arrived.pop_front() {
            Some(message) => {
                state.messages.unread[message.from.index()] -= message.payload.len();
                message
            }
            None => {
                let (from, payload) = state.bulk.pop_front()?;
                state.unread[from.index()] -= payload.len();
                Message { from, class: ByteClass::Kv, layer: u16::MAX, payload }
            }
        };
        if state.holding > 0 {
            self.room.notify_waiters();
        }
        Some(message)
    }

    /// Decides about a message by its header.
    pub(crate) fn admit_message(&self, peer: Rank, class: ByteClass, number: u64) -> Result<(), Violation> {
        if !class.is_round() {
            return Err(Violation::WrongStream { class, stream: "rows" });
        }
        let mut state = self.lock();
        let expected = &mut state.messages.next[peer.index()].1;
        if number != *expected {
            return Err(Violation::OutOfSequence { stream: "rows", number, expected: *expected });
        }
        *expected += 1;
        Ok(())
    }

    /// Waits until `bytes` more bytes of messages of `peer` may be kept.
    pub(crate) async fn message_room(&self, peer: Rank, bytes: usize) {
        let limit = self.limits.rounds.early_bytes;
        self.when_room(|state| {
            let unread = state.messages.unread[peer.index()];
            (unread == 0 || unread.saturating_add(bytes) <= limit).then_some(())
        })
        .await;
    }

    /// Stores an admitted message and wakes the rank.
    pub(crate) fn deliver_message(&self, peer: Rank, class: ByteClass, layer: u16, payload: Bytes) {
        let mut state = self.lock();
        self.count(&mut state, peer, class, false, payload.len());
        state.messages.unread[peer.index()] += payload.len();
        state.messages.arrived.push_back(Message { from: peer, class, layer, payload });
        drop(state);
        self.arrived.notify_all();
    }
}

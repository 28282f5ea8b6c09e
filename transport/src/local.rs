//! Ranks of one process: payloads change hands, nothing is copied and nothing touches a wire.

use crate::inbox::{Inbox, InboxLimits};
use crate::proto::round::RoundLimits;
use crate::{Arrivals, ByteClass, Communicator, LossCause, Message, RoundId, TransportError, WireStats};
use bytes::Bytes;
use exflow_placement::Rank;
use std::sync::Arc;
use std::time::Duration;

/// Bounds of a world in one process.
#[derive(Debug, Clone, Copy)]
pub struct LocalOptions {
    /// How long a round may take from its start; 30 s by default.
    pub round_timeout: Duration,
    /// Rounds that a rank may have open at once; 4 by default.
    pub max_open_rounds: usize,
    /// Largest payload, bytes; 1 GiB by default.
    pub max_frame_bytes: u32,
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self { round_timeout: Duration::from_secs(30), max_open_rounds: 4, max_frame_bytes: 1 << 30 }
    }
}

/// One rank of a world in one process.
///
/// Dropping it tells the others at once that it left.
#[derive(Debug)]
pub struct LocalCommunicator {
    rank: Rank,
    inboxes: Arc<[Inbox]>,
    /// Of the exchange that is being started.
    outgoing: Vec<(Rank, Bytes)>,
}

/// `n` ranks in this process, in order, with the default bounds.
pub fn world(n: usize) -> Vec<LocalCommunicator> {
    world_with(n, LocalOptions::default())
}

/// `n` ranks in this process, in order.
pub fn world_with(n: usize, options: LocalOptions) -> Vec<LocalCommunicator> {
    let rounds = RoundLimits {
        max_open: options.max_open_rounds.max(1),
        max_frame_bytes: options.max_frame_bytes,
        early_bytes: usize::MAX,
        timeout: options.round_timeout,
    };
    let limits = InboxLimits {
        rounds,
        bulk_unread_bytes: usize::MAX,
        bulk_unsent_bytes: usize::MAX,
        messages_unsent_bytes: usize::MAX,
        header_bytes: 0,
    };
    let inboxes: Arc<[Inbox]> = (0..n).map(|rank| Inbox::new(Rank::from(rank), n, limits)).collect();
    let communicator = |rank| LocalCommunicator {
        rank: Rank::from(rank),
        inboxes: Arc::clone(&inboxes),
        outgoing: Vec::with_capacity(n),
    };
    (0..n).map(communicator).collect()
}

impl LocalCommunicator {
    fn inbox(&self) -> &Inbox {
        &self.inboxes[self.rank.index()]
    }

    fn peers(&self) -> impl Iterator<Item = &Inbox> {
        self.inboxes.iter().enumerate().filter(|(rank, _)| *rank != self.rank.index()).map(|(_, inbox)| inbox)
    }
}

impl Communicator for LocalCommunicator {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.inboxes.len()
    }

    fn exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<Vec<Bytes>, TransportError> {
        self.start_exchange(round, send)?;
        self.finish_exchange(round)
    }

    fn start_exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError> {
        self.inboxes[self.rank.index()].start(round, send, &mut self.outgoing)?;
        for (to, payload) in self.outgoing.drain(..) {
            self.inboxes[to.index()].take_here(self.rank, round, payload);
        }
        Ok(())
    }

    fn finish_exchange(&mut self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        self.inbox().finish(round)
    }

    fn arrivals(&mut self, round: RoundId, wait: bool) -> Result<Arrivals, TransportError> {
        self.inbox().arrivals(round, wait)
    }

    fn send_bulk(&mut self, to: Rank, payload: Bytes) -> Result<(), TransportError> {
        self.inbox().reserve_bulk(to, payload.len())?;
        self.inbox().bulk_sent(to, payload.len());
        self.inboxes[to.index()].deliver_bulk(self.rank, payload);
        Ok(())
    }

    fn recv_bulk(&mut self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError> {
        self.inbox().recv_bulk(timeout)
    }

    fn send_message(
        &mut self,
        to: Rank,
        class: ByteClass,
        layer: u16,
        payload: Bytes,
    ) -> Result<(), TransportError> {
        self.inbox().send_message(to, class, payload.len())?;
        self.inboxes[to.index()].deliver_message(self.rank, class, layer, payload);
        Ok(())
    }

    fn recv_message(&mut self, timeout: Duration) -> Result<Option<Message>, TransportError> {
        self.inbox().recv_message(timeout)
    }

    fn stats(&self) -> WireStats {
        self.inbox().stats()
    }
}

impl Drop for LocalCommunicator {
    fn drop(&mut self) {
        let cause = match self.inbox().failure() {
            None => LossCause::Left,
            Some(failure) => LossCause::ClosedByPeer { reason: failure.to_string() },
        };
        self.peers().for_each(|peer| peer.lose_peer(self.rank, cause.clone()));
        self.inbox().close();
    }
}

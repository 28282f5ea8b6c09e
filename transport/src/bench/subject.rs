//! Anything that can run one exchange, and the QUIC ranks that can.

use crate::quic::QuicCommunicator;
use crate::{ByteClass, Communicator, RoundId, TransportError};
use bytes::Bytes;
use exflow_placement::Rank;
use std::time::Duration;

/// Bulk that a rank keeps waiting for each peer while bulk runs beside exchanges, bytes.
const BULK_BACKLOG: usize = 1 << 20;
/// Size of one bulk message, bytes.
const BULK_MESSAGE: usize = 64 * 1024;

/// The last bulk message of a turn.
const LAST_BULK: &[u8] = b"end";

/// One rank of a transport.
pub(super) trait Subject: Send {
    /// Makes the buffers for exchanges of `bytes` per peer.
    fn prepare(&mut self, bytes: usize);

    /// What is to be done between two exchanges, outside the time that is measured.
    fn between(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    /// One exchange.
    fn exchange(&mut self) -> Result<(), TransportError>;
}

/// A rank that talks over QUIC.
pub(super) struct Quic {
    comm: QuicCommunicator,
    number: u64,
    payload: Bytes,
    bulk: Option<Bytes>,
    /// Peers whose last bulk message has come already.
    ended: usize,
}

impl Quic {
    pub(super) fn new(comm: QuicCommunicator) -> Self {
        Self { comm, number: 0, payload: Bytes::new(), bulk: None, ended: 0 }
    }

    pub(super) fn world(world: Vec<QuicCommunicator>) -> Vec<Self> {
        world.into_iter().map(Self::new).collect()
    }

    pub(super) fn comm(&self) -> &QuicCommunicator {
        &self.comm
    }

    /// From now on, bulk runs towards every peer.
    pub(super) fn begin_bulk(&mut self) {
        self.bulk = Some(vec![9; BULK_MESSAGE].into());
    }

    /// No more bulk; to be followed by [`Quic::drain_bulk`].
    pub(super) fn end_bulk(&mut self) -> Result<(), TransportError> {
        self.bulk = None;
        let peers = self.peers();
        peers.into_iter().try_for_each(|to| self.comm.send_bulk(to, Bytes::from_static(LAST_BULK)))
    }

    /// Reads bulk to its end, so that nothing of it is on the way when the next turn begins.
    pub(super) fn drain_bulk(&mut self) -> Result<(), TransportError> {
        let mut left = self.peers().len();
        left -= std::mem::take(&mut self.ended);
        while left > 0 {
            let bulk = self.comm.recv_bulk(Duration::from_secs(1))?;
            left -= usize::from(bulk.is_some_and(|(_, bytes)| bytes == LAST_BULK));
        }
        Ok(())
    }

    fn peers(&self) -> Vec<Rank> {
        let own = self.comm.rank();
        (0..self.comm.world_size()).map(Rank::from).filter(|to| *to != own).collect()
    }

    /// An exchange of this payload with all, by rank.
    pub(super) fn all_gather(&mut self, payload: Bytes) -> Result<Vec<Bytes>, TransportError> {
        let round = self.next_round();
        self.comm.all_gather(round, payload)
    }

    fn next_round(&mut self) -> RoundId {
        let number = self.number;
        self.number += 1;
        RoundId { number, class: ByteClass::Dispatch, layer: u16::MAX }
    }
}

impl Subject for Quic {
    fn prepare(&mut self, bytes: usize) {
        self.payload = vec![7; bytes].into();
    }

    fn between(&mut self) -> Result<(), TransportError> {
        while let Some((_, bytes)) = self.comm.recv_bulk(Duration::ZERO)? {
            self.ended += usize::from(bytes == LAST_BULK);
        }
        let Some(bulk) = self.bulk.clone() else { return Ok(()) };
        for to in self.peers() {
            while self.comm.unsent_bulk(to) < BULK_BACKLOG {
                self.comm.send_bulk(to, bulk.clone())?;
            }
        }
        Ok(())
    }

    fn exchange(&mut self) -> Result<(), TransportError> {
        let round = self.next_round();
        let send = vec![self.payload.clone(); self.comm.world_size()];
        self.comm.exchange(round, send).map(drop)
    }
}

//! The UDP socket as quinn sees it.

use super::shaper::Shaper;
use crate::link::LinkSpec;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Largest UDP payload over IPv4, which also bounds one batch of segments.
const MAX_BATCH_BYTES: usize = 65507;

/// A socket whose batches of segments (GSO) never exceed what the kernel takes.
///
/// quinn batches up to ten packets. Ten of 9000 bytes are refused by the kernel, and quinn takes that for a
/// failed MTU probe and sends the same again, for ever.
pub(crate) struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
    shaper: Option<Shaper>,
}

impl CappedSocket {
    /// Wraps `socket` for packets of at most `max_payload` bytes, sent over a link to order if there is one.
    pub(crate) fn wrap(
        socket: UdpSocket,
        runtime: &dyn Runtime,
        max_payload: u16,
        link: Option<LinkSpec>,
    ) -> io::Result<Arc<Self>> {
        let shaper = link.map(|spec| Shaper::start(spec, socket.try_clone()?)).transpose()?;
        let inner = runtime.wrap_udp_socket(socket)?;
        let segments = (MAX_BATCH_BYTES / usize::from(max_payload)).clamp(1, inner.max_transmit_segments());
        Ok(Arc::new(Self { inner, segments, shaper }))
    }
}

impl fmt::Debug for CappedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CappedSocket").field("segments", &self.segments).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match &self.shaper {
            None => self.inner.try_send(transmit),
            Some(shaper) => {
                shaper.send(transmit);
                Ok(())
            }
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.segments
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

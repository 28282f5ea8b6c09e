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

/// Largest UDP payload over IPv4, which also bounds one batch of segments, sent or received.
const MAX_BATCH_BYTES: usize = 65507;

/// A socket whose batches of segments (GSO) never exceed what the kernel takes.
///
/// quinn batches up to ten packets. Ten of 9000 bytes are refused by the kernel, and quinn takes that for a
/// failed MTU probe and sends the same again, for ever. So batches that are too large are sent in parts; how many
/// segments a part may have follows from the packet size that the path was found to take.
pub(crate) struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Segments in a batch of the largest packets, where batches are received at all.
    receive_segments: usize,
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
        let receive_segments =
            MAX_BATCH_BYTES.div_ceil(usize::from(max_payload)).min(inner.max_receive_segments());
        Ok(Arc::new(Self { inner, receive_segments, shaper }))
    }
}

impl fmt::Debug for CappedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CappedSocket").field("shaper", &self.shaper).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match &self.shaper {
            None => send_in_parts(&*self.inner, transmit),
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
        self.inner.max_transmit_segments()
    }

    /// quinn makes one buffer of so many of the largest packets for each of 32 batches. The kernel joins no more than
    /// 64 KB of packets, so 64 of 9000 bytes, which it would say, are 16 MB of buffer that no cache holds.
    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Sends a batch, in parts where it is larger than the kernel takes at once.
fn send_in_parts(socket: &dyn AsyncUdpSocket, transmit: &Transmit<'_>) -> io::Result<()> {
    let (Some(segment), true) = (transmit.segment_size, transmit.contents.len() > MAX_BATCH_BYTES) else {
        return socket.try_send(transmit);
    };
    let part = (MAX_BATCH_BYTES / segment.max(1)).max(1) * segment.max(1);
    for contents in transmit.contents.chunks(part) {
        // A lone packet is no batch.
        let segment_size = Some(segment).filter(|segment| contents.len() > *segment);
        // Where the socket is full in the middle, quinn sends the whole again and the peer drops what it has.
        socket.try_send(&Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn,
            contents,
            segment_size,
            src_ip: transmit.src_ip,
        })?;
    }
    Ok(())
}

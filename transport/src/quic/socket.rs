//! The UDP socket as quinn sees it.

use super::shaper::Shaper;
use crate::link::LinkSpec;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;

/// Largest UDP payload over IPv4, which also bounds one batch of segments, sent or received.
const MAX_BATCH_BYTES: usize = 65507;

/// A socket whose batches of segments (GSO) never exceed what the kernel takes, and which is not asked again for what it
/// has just said that it does not have.
///
/// quinn batches up to ten packets. Ten of 9000 bytes are refused by the kernel, and quinn takes that for a
/// failed MTU probe and sends the same again, for ever. So batches that are too large are sent in parts; how many
/// segments a part may have follows from the packet size that the path was found to take.
pub(crate) struct CappedSocket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    /// Segments in a batch of the largest packets, where batches are received at all.
    receive_segments: usize,
    shaper: Option<Shaper>,
}

impl CappedSocket {
    /// Wraps `socket` for packets of at most `max_payload` bytes, sent over a link to order if there is one. Must be called
    /// within the runtime that will drive it.
    pub(crate) fn wrap(socket: UdpSocket, max_payload: u16, link: Option<LinkSpec>) -> io::Result<Arc<Self>> {
        let shaper = link.map(|spec| Shaper::start(spec, socket.try_clone()?)).transpose()?;
        let state = UdpSocketState::new((&socket).into())?;
        let io = tokio::net::UdpSocket::from_std(socket)?;
        let receive_segments = MAX_BATCH_BYTES.div_ceil(usize::from(max_payload)).min(state.gro_segments());
        Ok(Arc::new(Self { io, state, receive_segments, shaper }))
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), transmit))
    }

    /// Sends a batch, in parts where it is larger than the kernel takes at once.
    fn send_in_parts(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let (Some(segment), true) = (transmit.segment_size, transmit.contents.len() > MAX_BATCH_BYTES) else {
            return self.send(transmit);
        };
        let part = (MAX_BATCH_BYTES / segment.max(1)).max(1) * segment.max(1);
        for contents in transmit.contents.chunks(part) {
            // A lone packet is no batch.
            let segment_size = Some(segment).filter(|segment| contents.len() > *segment);
            // Where the socket is full in the middle, quinn sends the whole again and the peer drops what it has.
            self.send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size,
                src_ip: transmit.src_ip,
            })?;
        }
        Ok(())
    }
}

impl fmt::Debug for CappedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CappedSocket").field("shaper", &self.shaper).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match &self.shaper {
            None => self.send_in_parts(transmit),
            Some(shaper) => {
                shaper.send(transmit);
                Ok(())
            }
        }
    }

    /// quinn calls this until there is nothing more. A call that gave fewer messages than it had room for has said so
    /// already: what comes later makes the socket ready anew.
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let room = bufs.len().min(meta.len());
        loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let mut last = None;
            let received = self.io.try_io(Interest::READABLE, || {
                let count = self.state.recv((&self.io).into(), bufs, meta)?;
                if DRAINS && count < room {
                    // Said within the call, so that what arrives from now on is not taken for what it has read.
                    last = Some(count);
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(count)
            });
            // What a peer's network says of a packet is no failure of the socket: the next call gives what comes next.
            if let Some(count) = last.or(received.ok()) {
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// quinn makes one buffer of so many of the largest packets for each of 32 batches. The kernel joins no more than
    /// 64 KB of packets, so 64 of 9000 bytes, which it would say, are 16 MB of buffer that no cache holds.
    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Whether a call takes as many messages as there are, so that fewer than it has room for are all: `recvmmsg`, whose
/// sockets are edge-triggered besides.
const DRAINS: bool = cfg!(any(target_os = "linux", target_os = "android"));

type Waiting = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Waits until the socket takes more, for one task.
struct Writable {
    socket: Arc<CappedSocket>,
    waiting: Option<Waiting>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_none()
            && let Poll::Ready(now) = pin!(self.socket.io.writable()).poll(cx)
        {
            return Poll::Ready(now); // nearly always, and nothing is allocated for it
        }
        let socket = Arc::clone(&self.socket);
        let wait = || -> Waiting { Box::pin(async move { socket.io.writable().await }) };
        let done = self.waiting.get_or_insert_with(wait).as_mut().poll(cx);
        if done.is_ready() {
            self.waiting = None;
        }
        done
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

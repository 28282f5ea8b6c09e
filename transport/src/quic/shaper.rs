//! Packets on a link to order: a thread of its own sends each at its time, more exactly than the runtime's timer
//! of one millisecond could.

use crate::link::{LinkModel, LinkSpec};
use quinn::udp::Transmit;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Packets that may wait; more are lost.
const WAITING: usize = 1 << 16;
/// The last part of a wait is spun away: a sleeping thread wakes up late.
const SPIN: Duration = Duration::from_micros(80);

type Packet = (Duration, u64, SocketAddr, Vec<u8>);

/// Shapes what one socket sends.
#[derive(Debug)]
pub(crate) struct Shaper {
    state: std::sync::Mutex<(LinkModel, u64)>,
    born: Instant,
    packets: SyncSender<Packet>,
}

impl Shaper {
    /// Starts the thread, which ends with the shaper. `socket` sends from the shaped socket's address.
    pub(crate) fn start(spec: LinkSpec, socket: UdpSocket) -> io::Result<Self> {
        let salt = u64::from(socket.local_addr()?.port());
        let (packets, queue) = sync_channel(WAITING);
        let born = Instant::now();
        let name = "exflow-link".to_owned();
        std::thread::Builder::new().name(name).spawn(move || deliver(&queue, &socket, born))?;
        Ok(Self { state: std::sync::Mutex::new((LinkModel::new(spec, salt), 0)), born, packets })
    }

    /// Takes the packets of a transmission, which may hold several segments.
    pub(crate) fn send(&self, transmit: &Transmit<'_>) {
        let now = self.born.elapsed();
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for segment in transmit.contents.chunks(size) {
            let Some(fate) = state.0.send(now, segment.len()) else { continue };
            let mut bytes = segment.to_vec();
            if let Some(bit) = fate.flip {
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            for leave in fate.copy.into_iter().chain([fate.leave]) {
                state.1 += 1;
                match self.packets.try_send((leave, state.1, transmit.destination, bytes.clone())) {
                    Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
                }
            }
        }
    }
}

fn deliver(queue: &Receiver<Packet>, socket: &UdpSocket, born: Instant) {
    let mut waiting: BinaryHeap<Reverse<Packet>> = BinaryHeap::new();
    loop {
        let wait = waiting.peek().map(|Reverse(next)| next.0.saturating_sub(born.elapsed()));
        let packet = match wait {
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(wait) if wait > SPIN => queue.recv_timeout(wait - SPIN),
            Some(_) => queue.try_recv().map_err(|_| RecvTimeoutError::Timeout),
        };
        match packet {
            Ok(packet) => waiting.push(Reverse(packet)),
            // The packets of a socket that is gone are of no use to anybody, but for its last words.
            Err(RecvTimeoutError::Disconnected) if waiting.is_empty() => return,
            Err(_) => {}
        }
        while let Some(Reverse(next)) = waiting.peek() {
            if next.0 > born.elapsed() {
                break;
            }
            if let Some(Reverse((_, _, to, bytes))) = waiting.pop() {
                send(socket, to, &bytes);
            }
        }
        if wait.is_some_and(|wait| wait <= SPIN) {
            std::hint::spin_loop();
        }
    }
}

/// A packet that the system does not take is lost, like any other.
fn send(socket: &UdpSocket, to: SocketAddr, bytes: &[u8]) {
    while let Err(error) = socket.send_to(bytes, to) {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => std::thread::yield_now(),
            _ => return,
        }
    }
}

/// Packets that [`link_lateness`] sends.
const PROBES: usize = 500;

/// By how much packets miss the delay that a link was ordered with: median and 99th percentile, measured here and now with
/// lone packets of 200 bytes. The way through the loopback interface is part of it.
pub fn link_lateness(latency: Duration) -> io::Result<[Duration; 2]> {
    let [from, to] = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
    to.set_read_timeout(Some(latency + Duration::from_secs(1)))?;
    let destination = to.local_addr()?;
    let shaper = Shaper::start(LinkSpec { latency, ..LinkSpec::default() }, from)?;
    let mut late = Vec::with_capacity(PROBES);
    let mut packet = [0_u8; 200];
    for _ in 0..PROBES {
        let sent = Instant::now();
        shaper.send(&Transmit {
            destination,
            ecn: None,
            contents: &packet.clone(),
            segment_size: None,
            src_ip: None,
        });
        to.recv(&mut packet)?;
        late.push(sent.elapsed().saturating_sub(latency));
    }
    late.sort_unstable();
    Ok([late[PROBES / 2], late[PROBES * 99 / 100]])
}

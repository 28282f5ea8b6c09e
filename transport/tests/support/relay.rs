//! A way between two UDP sockets that a test can break: in one direction or both, or for packets over a size.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What becomes of packets.
#[derive(Debug)]
pub struct Path {
    /// Nothing gets through towards the far side.
    pub cut_there: AtomicBool,
    /// Nothing gets back.
    pub cut_back: AtomicBool,
    /// Larger packets are swallowed, both ways.
    pub largest: AtomicUsize,
}

impl Path {
    /// Sets both directions at once.
    pub fn cut(&self, cut: bool) {
        self.cut_there.store(cut, Ordering::Relaxed);
        self.cut_back.store(cut, Ordering::Relaxed);
    }

    fn lets(&self, cut: &AtomicBool, bytes: usize) -> bool {
        !cut.load(Ordering::Relaxed) && bytes <= self.largest.load(Ordering::Relaxed)
    }
}

/// Forwards between whoever sends to the address that is returned, one peer at a time, and `far`; its threads end with
/// the test's process.
pub fn relay(far: SocketAddr) -> (SocketAddr, Arc<Path>) {
    let socket = || UdpSocket::bind("127.0.0.1:0").expect("socket");
    let (front, back) = (socket(), socket());
    let address = front.local_addr().expect("address");
    let path = Arc::new(Path {
        cut_there: AtomicBool::new(false),
        cut_back: AtomicBool::new(false),
        largest: AtomicUsize::new(usize::MAX),
    });
    let clone = |socket: &UdpSocket| socket.try_clone().expect("clone");
    let (front_out, back_out) = (clone(&front), clone(&back));
    let peer = Arc::new(Mutex::new(None));
    let (known, there) = (Arc::clone(&peer), Arc::clone(&path));
    std::thread::spawn(move || {
        let mut packet = vec![0; 65536];
        loop {
            let Ok((length, from)) = front.recv_from(&mut packet) else { continue };
            *known.lock().expect("peer") = Some(from);
            if there.lets(&there.cut_there, length) {
                let _ = back_out.send_to(&packet[..length], far);
            }
        }
    });
    let way_back = Arc::clone(&path);
    std::thread::spawn(move || {
        let mut packet = vec![0; 65536];
        loop {
            let Ok((length, _)) = back.recv_from(&mut packet) else { continue };
            let to = *peer.lock().expect("peer");
            if let (Some(to), true) = (to, way_back.lets(&way_back.cut_back, length)) {
                let _ = front_out.send_to(&packet[..length], to);
            }
        }
    });
    (address, path)
}

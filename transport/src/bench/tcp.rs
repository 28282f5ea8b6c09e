//! The baseline: a full mesh of plain TCP connections, one thread per rank.

use super::subject::Subject;
use crate::TransportError;
use exflow_placement::Rank;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::task::Poll;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// How long a rank of another process may take to connect.
const CONNECTING: Duration = Duration::from_secs(20);

/// One rank.
pub(super) struct Tcp {
    rank: Rank,
    runtime: Runtime,
    /// In the order of their ranks.
    peers: Vec<tokio::net::TcpStream>,
    send: Vec<u8>,
    /// One payload per peer.
    receive: Vec<Vec<u8>>,
}

/// `n` ranks on 127.0.0.1.
pub(super) fn loopback_world(n: usize) -> Result<Vec<Tcp>, TransportError> {
    connect(n).map_err(|error| failed(Rank(0), &error))
}

fn failed(rank: Rank, error: &io::Error) -> TransportError {
    TransportError::System { rank, what: "TCP baseline".into(), cause: error.to_string() }
}

fn connect(n: usize) -> io::Result<Vec<Tcp>> {
    let mut streams: Vec<Vec<TcpStream>> = (0..n).map(|_| Vec::new()).collect();
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    for first in 0..n {
        for second in first + 1..n {
            let out = TcpStream::connect(listener.local_addr()?)?;
            streams[first].push(out);
            streams[second].push(listener.accept()?.0);
        }
    }
    streams.into_iter().enumerate().map(|(rank, streams)| Tcp::new(Rank::from(rank), streams)).collect()
}

/// One rank's ear while a mesh between processes is made.
pub(super) struct Ear {
    rank: Rank,
    listener: TcpListener,
}

impl Ear {
    pub(super) fn open(rank: Rank, on: IpAddr) -> Result<Self, TransportError> {
        let listener = TcpListener::bind(SocketAddr::new(on, 0)).map_err(|error| failed(rank, &error))?;
        Ok(Self { rank, listener })
    }

    pub(super) fn port(&self) -> Result<u16, TransportError> {
        self.listener.local_addr().map(|at| at.port()).map_err(|error| failed(self.rank, &error))
    }

    /// Dials the lower ranks and hears the higher ones; `addresses` by rank.
    pub(super) fn mesh(&self, addresses: &[SocketAddr]) -> Result<Tcp, TransportError> {
        self.connect(addresses).map_err(|error| failed(self.rank, &error))
    }

    fn connect(&self, addresses: &[SocketAddr]) -> io::Result<Tcp> {
        let own = self.rank.index();
        let mut peers: Vec<Option<TcpStream>> = addresses.iter().map(|_| None).collect();
        for (peer, address) in addresses.iter().enumerate().take(own) {
            let mut stream = TcpStream::connect_timeout(address, CONNECTING)?;
            stream.write_all(&self.rank.0.to_le_bytes())?;
            peers[peer] = Some(stream);
        }
        for _ in own + 1..addresses.len() {
            let mut stream = self.listener.accept()?.0;
            stream.set_read_timeout(Some(CONNECTING))?;
            let mut rank = [0; 2];
            stream.read_exact(&mut rank)?;
            let place = peers.get_mut(usize::from(u16::from_le_bytes(rank)));
            *place.ok_or(io::ErrorKind::InvalidData)? = Some(stream);
        }
        Tcp::new(self.rank, peers.into_iter().flatten().collect())
    }
}

impl Tcp {
    fn new(rank: Rank, streams: Vec<TcpStream>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let adopt = |stream: TcpStream| {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            tokio::net::TcpStream::from_std(stream)
        };
        let within = runtime.enter();
        let peers: Vec<_> = streams.into_iter().map(adopt).collect::<io::Result<_>>()?;
        drop(within);
        let receive = vec![Vec::new(); peers.len()];
        Ok(Self { rank, runtime, peers, send: Vec::new(), receive })
    }

    /// Tells every peer the same bytes and gives theirs, as many, by rank without this one.
    pub(super) fn gather(&mut self, own: &[u8]) -> Result<&[Vec<u8>], TransportError> {
        self.prepare(own.len());
        self.send.copy_from_slice(own);
        self.exchange()?;
        Ok(&self.receive)
    }
}

impl Subject for Tcp {
    fn prepare(&mut self, bytes: usize) {
        self.send.clear();
        self.send.resize(bytes, 7);
        self.receive.iter_mut().for_each(|buffer| buffer.resize(bytes, 0));
    }

    fn exchange(&mut self) -> Result<(), TransportError> {
        let Self { rank, runtime, peers, send, receive } = self;
        let mut done = vec![(0, 0); peers.len()];
        let result = runtime.block_on(std::future::poll_fn(|cx| {
            let mut busy = false;
            for ((peer, buffer), (sent, received)) in peers.iter().zip(receive.iter_mut()).zip(&mut done) {
                while *sent < send.len() && peer.poll_write_ready(cx)?.is_ready() {
                    *sent += ready(peer.try_write(&send[*sent..]))?.unwrap_or(0);
                }
                while *received < buffer.len() && peer.poll_read_ready(cx)?.is_ready() {
                    match ready(peer.try_read(&mut buffer[*received..]))? {
                        Some(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                        got => *received += got.unwrap_or(0),
                    }
                }
                busy |= *sent < send.len() || *received < buffer.len();
            }
            if busy { Poll::Pending } else { Poll::Ready(Ok(())) }
        }));
        result.map_err(|error| failed(*rank, &error))
    }
}

/// `None` where the socket was not ready after all.
fn ready(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

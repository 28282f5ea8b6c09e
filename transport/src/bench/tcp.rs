//! The baseline: a full mesh of plain TCP connections, one thread per rank.

use super::Subject;
use crate::TransportError;
use exflow_placement::Rank;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::task::Poll;
use tokio::runtime::{Builder, Runtime};

const CHUNK: usize = 256 * 1024;

/// One rank.
pub(super) struct Tcp {
    rank: Rank,
    runtime: Runtime,
    peers: Vec<tokio::net::TcpStream>,
    buffer: Vec<u8>,
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

impl Tcp {
    fn new(rank: Rank, streams: Vec<TcpStream>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let adopt = |stream: TcpStream| {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            tokio::net::TcpStream::from_std(stream)
        };
        let within = runtime.enter();
        let peers = streams.into_iter().map(adopt).collect::<io::Result<_>>()?;
        drop(within);
        Ok(Self { rank, runtime, peers, buffer: vec![7; CHUNK] })
    }
}

impl Subject for Tcp {
    fn exchange(&mut self, bytes: usize) -> Result<(), TransportError> {
        let Self { rank, runtime, peers, buffer } = self;
        let mut left = vec![(bytes, bytes); peers.len()];
        let done = runtime.block_on(std::future::poll_fn(|cx| {
            let mut busy = false;
            for (peer, (to_send, to_receive)) in peers.iter().zip(&mut left) {
                while *to_send > 0 && peer.poll_write_ready(cx)?.is_ready() {
                    let size = (*to_send).min(CHUNK);
                    *to_send -= ready(peer.try_write(&buffer[..size]))?.unwrap_or(0);
                }
                while *to_receive > 0 && peer.poll_read_ready(cx)?.is_ready() {
                    let size = (*to_receive).min(CHUNK);
                    match ready(peer.try_read(&mut buffer[..size]))? {
                        Some(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                        got => *to_receive -= got.unwrap_or(0),
                    }
                }
                busy |= *to_send > 0 || *to_receive > 0;
            }
            if busy { Poll::Pending } else { Poll::Ready(Ok(())) }
        }));
        done.map_err(|error| failed(*rank, &error))
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

//! Once running, a message costs no allocation of ours. One test, as the counter counts every thread of the process.

mod support;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::quic::{self, DriverThreads, QuicOptions};
use exflow_transport::{ByteClass, Communicator, Pool, local};
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use std::alloc::System;
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::time::Duration;
use support::{bounded, on_threads, quick, round};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Turns until all memory is there, and those that count.
const WARM: u64 = 300;
const TURNS: u64 = 500;
/// Bytes of a message that fits in one packet of quinn's first size.
const SMALL: usize = 1000;

/// A rank that exchanges rows and, where it `talks`, sends its successor a message and background bytes, all of `bytes` each, in
/// memory that it uses again.
struct Talker<C> {
    comm: C,
    pool: Pool,
    send: Vec<Bytes>,
    bytes: usize,
    talks: bool,
}

impl<C: Communicator> Talker<C> {
    fn payload(&mut self, value: u8) -> Bytes {
        let mut buffer = self.pool.buffer(self.bytes);
        buffer.resize(self.bytes, value);
        self.pool.seal(buffer)
    }

    fn check(&self, payload: &[u8], value: u8) {
        assert!(payload.len() == self.bytes && payload.iter().all(|byte| *byte == value));
    }

    fn turn(&mut self, number: u64) {
        let (me, world, value) = (self.comm.rank().index(), self.comm.world_size(), number as u8);
        let content = |from: usize, to: usize| value.wrapping_add((from * world + to) as u8);
        let mut send = std::mem::take(&mut self.send);
        send.clear();
        (0..world).for_each(|to| send.push(self.payload(content(me, to))));
        // What comes is the vector of the next turn.
        self.send = self.comm.exchange(round(number, ByteClass::Dispatch), send).expect("exchange");
        self.send.iter().enumerate().for_each(|(from, payload)| self.check(payload, content(from, me)));
        if self.talks {
            let to = Rank::from((me + 1) % world);
            let payload = self.payload(value);
            self.comm.send_message(to, ByteClass::Ids, 0, payload).expect("message");
            let payload = self.payload(value);
            self.comm.send_bulk(to, payload).expect("bulk");
            for _ in 0..2 {
                let message = self.comm.recv_message(Duration::from_secs(10)).expect("message");
                self.check(&message.expect("in time").payload, value);
            }
        }
    }
}

/// Allocations, and bytes allocated, per turn of all ranks.
fn per_turn<C: Communicator + 'static>(world: Vec<C>, bytes: usize, talks: bool) -> (f64, f64) {
    let gate = Arc::new(Barrier::new(world.len()));
    let changes = on_threads(world, move |comm| {
        let mut talker = Talker { comm, pool: Pool::default(), send: Vec::new(), bytes, talks };
        (0..WARM).for_each(|number| talker.turn(number));
        gate.wait();
        let region = Region::new(COUNTED);
        (WARM..WARM + TURNS).for_each(|number| talker.turn(number));
        gate.wait();
        let change = region.change();
        gate.wait();
        change
    });
    of_turn(changes[0])
}

fn of_turn(change: Stats) -> (f64, f64) {
    let allocations = change.allocations + change.reallocations;
    (allocations as f64 / TURNS as f64, change.bytes_allocated as f64 / TURNS as f64)
}

/// The same traffic by quinn alone: two ends that send each other a header and a payload at a time.
fn quinn_alone(bytes: usize) -> (f64, f64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let (dialler, acceptor) = connected().await;
        let opened = dialler.1.open_bi().await.expect("open");
        let first = tokio::spawn(end(opened, bytes));
        let accepted = acceptor.1.accept_bi().await.expect("accept");
        let second = tokio::spawn(end(accepted, bytes));
        let change = first.await.expect("first end");
        second.await.expect("second end");
        of_turn(change)
    })
}

async fn end((mut send, mut receive): (quinn::SendStream, quinn::RecvStream), bytes: usize) -> Stats {
    let parts = [Bytes::from_static(&[1; 40]), Bytes::from(vec![1; bytes])];
    let mut region = Region::new(COUNTED);
    for turn in 0..WARM + TURNS {
        if turn == WARM {
            region.reset();
        }
        send.write_all_chunks(&mut parts.clone()).await.expect("write");
        let mut left = 40 + bytes;
        while left > 0 {
            left -= receive.read_chunk(left, true).await.expect("read").expect("more").bytes.len();
        }
    }
    region.change()
}

/// Two endpoints with quinn's own settings, and their connection.
async fn connected() -> ((Endpoint, Connection), (Endpoint, Connection)) {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("certificate");
    let certificate = made.cert.der().clone();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let server = ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).expect("server");
    let acceptor = Endpoint::server(server, any).expect("server");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).expect("root");
    let mut dialler = Endpoint::client(any).expect("client");
    dialler.set_default_client_config(ClientConfig::with_root_certificates(Arc::new(roots)).expect("client"));
    let connecting = dialler.connect(acceptor.local_addr().expect("address"), "localhost").expect("connect");
    let (one, other) = tokio::join!(connecting, async { acceptor.accept().await.expect("guest").await });
    ((dialler, one.expect("dialler")), (acceptor, other.expect("acceptor")))
}

#[test]
fn messages_cost_no_allocation_once_running() {
    bounded(|| {
        for bytes in [0, 1024, 20_000] {
            let (allocations, _) = per_turn(local::world(3), bytes, true);
            assert!(allocations < 0.05, "{allocations} a turn of {bytes} bytes in one process");
        }
        let world = || {
            quic::loopback_world(2, QuicOptions { threads: DriverThreads::Shared, ..quick() }).expect("world")
        };
        // quinn allocates for packets and for what it has to send again: two or three times a message.
        let (ours, quinns) = (per_turn(world(), SMALL, false).0, quinn_alone(SMALL).0);
        assert!(ours < quinns + 0.5, "{ours} a turn of two messages over QUIC, {quinns} by quinn alone");
        // Six payloads a turn, and quinn's memory for what it receives: one more copy into new memory would be twice that.
        let large = 200_000;
        let bytes = per_turn(world(), large, true).1;
        assert!(bytes < 1.5 * 6.0 * large as f64, "{bytes} bytes a turn of six payloads of {large}");
    });
}

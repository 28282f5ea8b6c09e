//! Writes the seeds of the fuzz targets: `cargo run -p exflow-transport --example fuzz_seeds -- transport/fuzz/corpus`.

use exflow_placement::Rank;
use exflow_transport::proto::frame::FrameHeader;
use exflow_transport::proto::membership::{Hello, Message, PROTOCOL_VERSION, Roster, Welcome, WorldName};
use exflow_transport::{ByteClass, Refusal};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

fn frame(class: ByteClass, number: u64, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let header = FrameHeader { class, layer: 3, world: 77, epoch: 1, source: Rank(1), number, length };
    [&header.encode()[..], payload].concat()
}

fn main() -> std::io::Result<()> {
    let root = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "transport/fuzz/corpus".into()));
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        rank: Rank(2),
        world_size: 4,
        ranks: 1,
        offer: Vec::new(),
        model: [1; 32],
        table: Some([2; 32]),
        numerics: "exact".into(),
        max_frame_bytes: 1 << 20,
        port: 7447,
        epoch: 3,
        world: Some(WorldName { id: 77, epoch: 3 }),
    };
    let welcome = Welcome {
        world: WorldName { id: 77, epoch: 3 },
        max_frame_bytes: 1 << 20,
        roster: Roster::new([(1, Some(SocketAddr::from(([10, 0, 0, 1], 7447)))); 4]),
        settings: vec![1, 2, 3],
    };
    let first = Hello { table: None, world: None, ..hello.clone() };
    let several = [frame(ByteClass::Dispatch, 0, b"row"), frame(ByteClass::Combine, 1, b"")].concat();
    let seeds: [(&str, Vec<u8>); 9] = [
        ("frame/one", [&[255], &frame(ByteClass::Ids, 9, &[5; 100])[..]].concat()),
        ("frame/pieces", [&[7], &several[..]].concat()),
        ("frame/too-long", [&[64], &frame(ByteClass::Kv, 0, &[0; 5000])[..40]].concat()),
        ("hello/first", Message::Hello(first).encode()),
        ("hello/mesh", Message::Hello(hello).encode()),
        ("hello/welcome", Message::Welcome(welcome).encode()),
        ("hello/refuse", Message::Refuse(Refusal::Incomplete { missing: vec![Rank(3)] }).encode()),
        ("rounds/plain", vec![1, 0, 0, 0, 1, 9, 1, 0, 0, 0, 2, 9, 1, 0, 0, 0, 3, 9, 0, 0, 0, 0, 0, 0]),
        ("rounds/replay", vec![0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 1, 0, 0, 0, 1, 9, 1, 3, 0, 0, 2, 200]),
    ];
    for (name, bytes) in seeds {
        fs::write(root.join(name), bytes)?;
    }
    Ok(())
}

//! What is fuzzed: by cargo-fuzz (`fuzz_targets/`), and with changes of the committed corpus by `transport/tests/fuzz.rs`.

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::proto::frame::Decoder;
use exflow_transport::proto::membership::{Hello, Lobby, LobbyTerms, Message, PROTOCOL_VERSION};
use exflow_transport::proto::pulse::Beat;
use exflow_transport::proto::round::{Admission, RoundLimits, Rounds};
use exflow_transport::{ByteClass, RoundId};
use std::net::SocketAddr;
use std::time::Duration;

const CAP: u32 = 4096;
const LIMITS: RoundLimits =
    RoundLimits { max_open: 2, max_frame_bytes: 200, early_bytes: 300, timeout: Duration::from_secs(1) };

/// Frames out of any bytes, in pieces whose size the first byte gives: no panic, no payload over the cap.
pub(crate) fn frame(data: &[u8]) {
    let Some((piece, wire)) = data.split_first() else { return };
    let mut decoder = Decoder::new(CAP);
    let mut in_payload = false;
    for piece in wire.chunks(usize::from(*piece).max(1)) {
        let mut input = Bytes::copy_from_slice(piece);
        loop {
            if !in_payload {
                match decoder.header(&mut input) {
                    Ok(Some(header)) => assert!(header.length <= CAP),
                    Ok(None) => break,
                    Err(_) => return,
                }
            }
            in_payload = decoder.payload(&mut input).is_none();
            if in_payload {
                break;
            }
        }
    }
}

/// Messages of joining out of any bytes: what can be read is written back to the same message, and the lobby takes it.
pub(crate) fn hello(data: &[u8]) {
    // Heartbeats are decoded from the same stream.
    if let Some(beat) = Beat::decode(data) {
        assert_eq!(Beat::decode(&beat.encode()), Some(beat));
    }
    let Some(message) = Message::decode(data) else { return };
    assert_eq!(Message::decode(&message.encode()).as_ref(), Some(&message));
    if let Message::Hello(hello) = message {
        let own = Hello {
            protocol: PROTOCOL_VERSION,
            rank: Rank(0),
            world_size: hello.world_size.clamp(1, 64),
            ranks: 1,
            offer: Vec::new(),
            model: hello.model,
            table: None,
            numerics: "exact".into(),
            max_frame_bytes: 1 << 20,
            port: 7447,
            epoch: 0,
            world: None,
        };
        let from = SocketAddr::from(([127, 0, 0, 1], 9));
        let mut lobby =
            Lobby::new(own, LobbyTerms { deadline: Duration::from_secs(1), ..LobbyTerms::default() });
        if lobby.hear(1, &hello, from).is_ok() {
            assert!(lobby.hear(2, &hello, from).is_err());
        }
    }
}

/// Headers of any kind against the rounds of a rank: six bytes a step. No panic, bounded memory.
pub(crate) fn rounds(data: &[u8]) {
    let mut rounds = Rounds::new(Rank(0), 4, LIMITS);
    for step in data.chunks_exact(6) {
        let class = ByteClass::from_number(step[2] % 5).unwrap_or(ByteClass::Ids);
        let id = RoundId { number: step[1].into(), class, layer: (step[3] % 2).into() };
        let peer = Rank((step[4] % 6).into());
        if step[0] % 4 == 0 {
            let next = RoundId { number: rounds.next_number(), ..id };
            let _ = rounds.start(next, Bytes::new(), Duration::ZERO);
            let _ = rounds.poll(next.number, Duration::from_millis(step[5].into()));
        } else {
            match rounds.admit(peer, id, step[5].into()) {
                Ok(Admission::Take) => {
                    let _ = rounds.deliver(peer, id.number, Bytes::from(vec![0; step[5].into()]));
                }
                Ok(Admission::Hold) => {}
                Err(violation) => rounds.break_peer(peer, violation),
            }
        }
        assert!((1..4).all(|peer| rounds.early_bytes(Rank(peer)) <= LIMITS.early_bytes));
    }
}

//! Messages of joining out of any bytes: what can be read is written back to the same message, and the lobby takes it.
#![no_main]

use exflow_placement::Rank;
use exflow_transport::proto::membership::{Hello, Lobby, LobbyTerms, Message, PROTOCOL_VERSION};
use libfuzzer_sys::fuzz_target;
use std::net::SocketAddr;
use std::time::Duration;

fuzz_target!(|data: &[u8]| {
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
        let mut lobby = Lobby::new(own, LobbyTerms { deadline: Duration::from_secs(1), ..LobbyTerms::default() });
        if lobby.hear(1, &hello, from).is_ok() {
            assert!(lobby.hear(2, &hello, from).is_err());
        }
    }
});

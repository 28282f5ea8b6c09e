//! Headers of any kind against the rounds of a rank: six bytes a step. No panic, bounded memory.
#![no_main]

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::proto::round::{Admission, RoundLimits, Rounds};
use exflow_transport::{ByteClass, RoundId};
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

const LIMITS: RoundLimits =
    RoundLimits { max_open: 2, max_frame_bytes: 200, early_bytes: 300, timeout: Duration::from_secs(1) };

fuzz_target!(|data: &[u8]| {
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
                Ok(Admission::Take) => drop(rounds.deliver(peer, id.number, Bytes::from(vec![0; step[5].into()]))),
                Ok(Admission::Hold) => {}
                Err(violation) => rounds.break_peer(peer, violation),
            }
        }
        assert!((1..4).all(|peer| rounds.early_bytes(Rank(peer)) <= LIMITS.early_bytes));
    }
});

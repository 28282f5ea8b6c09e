//! Frames out of any bytes, in pieces whose size the first byte gives: no panic, no payload over the cap.
#![no_main]

use bytes::Bytes;
use exflow_transport::proto::frame::Decoder;
use libfuzzer_sys::fuzz_target;

const CAP: u32 = 4096;

fuzz_target!(|data: &[u8]| {
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
});

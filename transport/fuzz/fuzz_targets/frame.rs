//! Frames out of any bytes, in pieces whose size the first byte gives: no panic, no payload over the cap.
#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code, reason = "each target uses one of them")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::frame(data));

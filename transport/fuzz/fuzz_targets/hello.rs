//! Messages of joining out of any bytes: what can be read is written back to the same message, and the lobby takes it.
#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code, reason = "each target uses one of them")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::hello(data));

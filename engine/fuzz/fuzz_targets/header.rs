//! A safetensors file out of any bytes. Seeds: the safetensors files of tests/parity/fixtures.
#![no_main]

#[path = "../bodies.rs"]
mod bodies;

use exflow_engine as engine;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    bodies::header(data);
});

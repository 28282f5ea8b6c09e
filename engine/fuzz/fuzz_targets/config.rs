//! A config.json out of any bytes. Seeds: the config.json files of tests/parity/fixtures.
#![no_main]

#[path = "../bodies.rs"]
mod bodies;

use exflow_engine as engine;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    bodies::config(data);
});

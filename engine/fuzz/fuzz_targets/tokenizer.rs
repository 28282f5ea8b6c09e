//! A tokenizer.json out of any bytes. Seeds: the files of tests/parity/tokenizers.
#![no_main]

#[path = "../bodies.rs"]
mod bodies;

use exflow_engine as engine;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    bodies::tokenizer(data);
});

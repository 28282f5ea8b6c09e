//! The header of a safetensors file out of any bytes. Seeds: the safetensors files of tests/parity/fixtures.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(tensors) = exflow_engine::check_safetensors(data) {
        assert!(tensors <= data.len());
    }
});

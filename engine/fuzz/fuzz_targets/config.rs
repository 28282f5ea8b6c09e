//! A config.json out of any bytes. Seeds: the config.json files of tests/parity/fixtures.
#![no_main]

use exflow_engine::ModelSpec;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    if let Ok(spec) = ModelSpec::parse(Path::new("config.json"), data) {
        assert!(spec.top_k <= spec.experts && spec.moe_layers() > 0 && spec.cached_values() > 0);
        if let Some(rope) = &spec.attention.rope {
            assert!(rope.dim.is_multiple_of(2));
        }
    }
});

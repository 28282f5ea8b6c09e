//! What the fuzz targets do with any bytes. Tests of the engine run the same on spoilt files (`src/hostile_tests.rs`), so
//! that it compiles and holds without a nightly compiler too. Whoever includes this names the engine `engine`.

use super::engine::{ModelSpec, TextCodec, TextStream, check_safetensors};
use std::path::Path;

/// A config.json; whether it can be read.
#[allow(dead_code, reason = "each target takes one of these")]
pub(super) fn config(data: &[u8]) -> bool {
    let Ok(spec) = ModelSpec::parse(Path::new("config.json"), data) else { return false };
    assert!(spec.top_k <= spec.experts && spec.moe_layers() > 0 && spec.cached_values() > 0);
    if let Some(rope) = &spec.attention.rope {
        assert!(rope.dim.is_multiple_of(2));
    }
    true
}

/// A safetensors file; whether it can be read.
#[allow(dead_code, reason = "each target takes one of these")]
pub(super) fn header(data: &[u8]) -> bool {
    let tensors = check_safetensors(data);
    tensors.is_ok_and(|tensors| {
        assert!(tensors <= data.len());
        true
    })
}

/// Of the tokenizer's model.
const VOCABULARY: usize = 1000;

/// A tokenizer.json; whether it can be read. What it makes of a text stays within the vocabulary and can be read again.
#[allow(dead_code, reason = "each target takes one of these")]
pub(super) fn tokenizer(data: &[u8]) -> bool {
    let Ok(codec) = TextCodec::parse("tokenizer.json".into(), data, VOCABULARY) else { return false };
    let Ok(ids) = codec.encode("a né 日本 🦀 \0 <s>") else { return true };
    assert!(ids.iter().all(|&id| (id as usize) < VOCABULARY));
    let mut stream = TextStream::default();
    if ids.into_iter().all(|id| stream.push(&codec, id).is_ok()) {
        let _ = stream.finish(&codec);
    }
    true
}

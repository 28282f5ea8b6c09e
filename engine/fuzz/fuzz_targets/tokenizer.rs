//! A tokenizer.json out of any bytes; what it makes of a text stays within the vocabulary and can be read again.
//! Seeds: the files of tests/parity/tokenizers.
#![no_main]

use exflow_engine::{TextCodec, TextStream};
use libfuzzer_sys::fuzz_target;

const VOCABULARY: usize = 1000;

fuzz_target!(|data: &[u8]| {
    let Ok(codec) = TextCodec::parse("tokenizer.json".into(), data, VOCABULARY) else { return };
    let Ok(ids) = codec.encode("a né 日本 🦀 \0 <s>") else { return };
    assert!(ids.iter().all(|&id| (id as usize) < VOCABULARY));
    let mut stream = TextStream::default();
    for id in ids {
        if stream.push(&codec, id).is_err() {
            return;
        }
    }
    let _ = stream.finish(&codec);
});

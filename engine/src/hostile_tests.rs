//! Files of models with bytes changed, cut and doubled at random: they are read or refused, and nothing panics. The fuzz
//! targets of `engine/fuzz` look deeper, and take longer.

use crate as engine;
use crate::model::ModelSpec;
use crate::weights;
use std::path::{Path, PathBuf};

/// SplitMix64's steps: the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)) % n.max(1) as u64) as usize
    }

    /// One to four changes of the kinds that make parsers stumble.
    fn spoil(&mut self, sound: &[u8]) -> Vec<u8> {
        const NUMBERS: [&[u8]; 8] =
            [b"0", b"-1", b"18446744073709551615", b"4294967296", b"1e999", b"null", b"0.5", b"[]"];
        let mut bytes = sound.to_vec();
        for _ in 0..=self.below(4) {
            let (at, kind) = (self.below(bytes.len()), self.below(5));
            let end = (at + self.below(12)).min(bytes.len());
            match kind {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => drop(bytes.drain(at..end)),
                2 => bytes.truncate(bytes.len() - self.below(bytes.len().min(9))),
                3 => {
                    let again = bytes[at..end].to_vec();
                    bytes.splice(at..at, again);
                }
                _ => {
                    // A number in place of the next one.
                    let digit = |i: &usize| bytes[*i].is_ascii_digit();
                    if let Some(first) = (at..bytes.len()).find(digit) {
                        let last = (first..bytes.len()).find(|i| !digit(i)).unwrap_or(bytes.len());
                        bytes.splice(first..last, NUMBERS[self.below(NUMBERS.len())].iter().copied());
                    }
                }
            }
            if bytes.is_empty() {
                break;
            }
        }
        bytes
    }
}

fn parity(folder: &str, suffix: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity").join(folder);
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(root).expect("fixtures").map(|e| e.expect("an entry").path()).collect();
    found.iter_mut().filter(|path| path.is_dir()).for_each(|path| path.push(suffix));
    found.retain(|path| path.to_string_lossy().ends_with(suffix) && path.exists());
    found.sort();
    assert!(found.len() > 3);
    found
}

#[path = "../fuzz/bodies.rs"]
mod bodies;

/// `times` spoilt copies of each file; returns how many could be read all the same.
fn spoil_each(seed: u64, files: &[PathBuf], times: usize, body: fn(&[u8]) -> bool) -> usize {
    let mut random = Random(seed);
    let mut read = 0;
    for path in files {
        let sound = std::fs::read(path).expect("a sound file");
        assert!(body(&sound), "{} is sound", path.display());
        read += (0..times).filter(|_| body(&random.spoil(&sound))).count();
    }
    read
}

#[test]
fn spoilt_configs_are_read_or_refused() {
    let read = spoil_each(1, &parity("fixtures", "config.json"), 150, bodies::config);
    assert!(read > 100, "some changes do no harm: {read}");
}

#[test]
fn what_is_wrong_with_a_config_is_the_inputs_fault() {
    let mut random = Random(4);
    for path in parity("fixtures", "config.json") {
        let sound = std::fs::read(&path).expect("a config");
        for _ in 0..30 {
            if let Err(error) = ModelSpec::parse(&path, &random.spoil(&sound)) {
                assert!(error.is_input(), "{error}");
            }
        }
    }
}

#[test]
fn spoilt_headers_are_read_or_refused() {
    let mut random = Random(2);
    for path in parity("fixtures", "model.safetensors") {
        let whole = std::fs::read(&path).expect("a file");
        let length = u64::from_le_bytes(*whole.first_chunk().expect("a header")) as usize;
        for _ in 0..40 {
            let mut bytes = random.spoil(&whole[8..8 + length]);
            let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
            file.append(&mut bytes);
            file.extend_from_slice(&whole[8 + length..]);
            bodies::header(&file);
            if let Ok((header, metadata)) = weights::header(&file) {
                let inside = |(_, info): (String, &safetensors::tensor::TensorInfo)| {
                    info.data_offsets.0 <= info.data_offsets.1
                        && header + 8 + info.data_offsets.1 <= file.len()
                };
                assert!(metadata.tensors().into_iter().all(inside), "{}", path.display());
            }
        }
    }
}

#[test]
fn spoilt_tokenizers_are_read_or_refused() {
    let mut files = parity("tokenizers", ".json");
    files.retain(|path| !path.to_string_lossy().contains("cases"));
    let read = spoil_each(3, &files, 150, bodies::tokenizer);
    assert!(read > 20, "some changes do no harm: {read}");
}

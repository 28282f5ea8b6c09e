//! Keys and values as the cache holds them (`shared/cached.wgsl`), on the CPU: for frames that carry them in that type,
//! and for the twins.

use crate::KV_BLOCK;
use half::f16;

/// How the cache holds keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Cache {
    /// 4 bytes a value.
    #[default]
    F32,
    /// 2 bytes.
    F16,
    /// A byte, and a scale for 32 values.
    Q8,
}

/// Values that share a scale.
const BLOCK: usize = 32;

impl Cache {
    /// Every way.
    pub const ALL: [Cache; 3] = [Self::F32, Self::F16, Self::Q8];

    /// Words of a row of `width` values (whole vec4s).
    pub fn words(self, width: usize) -> usize {
        match self {
            Self::F32 => width,
            Self::F16 => width / 2,
            Self::Q8 => width / 4 + width.div_ceil(BLOCK),
        }
    }

    /// Words from a row of `width` values in the cache to the next: where a row is a multiple of 1 KiB, 64 bytes are left
    /// free behind it.
    pub fn stride(self, width: usize) -> usize {
        let words = self.words(width);
        if words.is_multiple_of(256) { words + 16 } else { words }
    }

    /// Where word `word` of the row of a slot is: rows of `width` values lie in blocks of [`KV_BLOCK`], part by part of `part` words,
    /// the first of all rows of a block, then the second (`cached_row`). A part of [`Cache::stride`] words is a whole row.
    pub fn place(self, width: usize, part: usize, (slot, word): (usize, usize)) -> usize {
        let block = slot / KV_BLOCK * KV_BLOCK * self.stride(width);
        block + word / part * part * KV_BLOCK + slot % KV_BLOCK * part + word % part
    }

    /// Words of an element of the cache, which holds four values: what a kernel takes at once.
    pub fn texel_words(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q8 => 1,
        }
    }

    /// A row as the cache holds it. Packing what was unpacked gives the same words.
    pub fn pack(self, row: &[f32]) -> Vec<u32> {
        match self {
            Self::F32 => row.iter().map(|v| v.to_bits()).collect(),
            Self::F16 => {
                let half = |v: f32| u32::from(f16::from_f32(v).to_bits());
                row.chunks_exact(2).map(|two| half(two[0]) | half(two[1]) << 16).collect()
            }
            Self::Q8 => {
                let mut words = vec![0; self.words(row.len())];
                let (values, scales) = words.split_at_mut(row.len() / 4);
                for ((block, words), scale) in row.chunks(BLOCK).zip(values.chunks_mut(BLOCK / 4)).zip(scales)
                {
                    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                    // To the nearest number of eight bits, so that 127 steps of it are exact.
                    *scale = ((largest / 127.0).to_bits() + 0x8000) & 0xffff_0000;
                    let step = f32::from_bits(*scale);
                    for (i, v) in block.iter().enumerate().filter(|_| step > 0.0) {
                        let byte = (v / step).round_ties_even().clamp(-127.0, 127.0) as i8;
                        words[i / 4] |= u32::from(byte as u8) << (8 * (i % 4));
                    }
                }
                words
            }
        }
    }

    /// The values that the words of a row of `width` values stand for.
    pub fn unpack(self, words: &[u32], width: usize) -> Vec<f32> {
        let value = |i: usize| match self {
            Self::F32 => f32::from_bits(words[i]),
            Self::F16 => f16::from_bits((words[i / 2] >> (16 * (i % 2))) as u16).to_f32(),
            Self::Q8 => {
                let byte = (words[i / 4] >> (8 * (i % 4))) as u8 as i8;
                f32::from(byte) * f32::from_bits(words[width / 4 + i / BLOCK])
            }
        };
        (0..width).map(value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_what_was_rounded_changes_nothing() {
        let row: Vec<f32> =
            (0..68).map(|i| ((i * 37 % 71) as f32 - 35.0) / 7.3 * 2f32.powi(i / 32 * 9 - 12)).collect();
        for (cache, step) in [(Cache::F32, 0.0), (Cache::F16, 0.001), (Cache::Q8, 0.005)] {
            let words = cache.pack(&row);
            assert_eq!(words.len(), cache.words(row.len()));
            let rounded = cache.unpack(&words, row.len());
            assert_eq!(cache.pack(&rounded), words, "{cache:?}");
            for (block, there) in row.chunks(32).zip(rounded.chunks(32)) {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(block.iter().zip(there).all(|(a, b)| (a - b).abs() <= step * largest), "{cache:?}");
            }
        }
    }
}

//! Number formats that weights come in, to f32. Little-endian throughout.

use half::{bf16, f16};
use std::path::Path;

pub(super) fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub(super) fn f16s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

pub(super) fn bf16s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

/// FP8 E4M3 (Micikevicius et al. 2022, arXiv 2209.05433): 4 bits of exponent with bias 7, no infinities.
pub(super) fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 E2M1 values, low nibble first, with one power of two each.
pub(super) fn mxfp4(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = |nibble: u8| {
        let size = VALUES[usize::from(nibble & 7)];
        if nibble & 8 != 0 { -size } else { size }
    };
    let mut values = Vec::with_capacity(blocks.len() * 2);
    for (block, &scale) in blocks.chunks_exact(16).zip(scales) {
        let scale = if scale == 255 { f32::NAN } else { 2f32.powi(i32::from(scale) - 127) };
        values.extend(block.iter().flat_map(|b| [value(b & 15) * scale, value(b >> 4) * scale]));
    }
    values
}

/// Rows and columns that share a scale of an FP8 matrix: `quantization_config.weight_block_size`, 128 x 128 as a rule.
pub(super) fn fp8_block(folder: &Path) -> (usize, usize) {
    let config = std::fs::read(folder.join("config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    let size = &config["quantization_config"]["weight_block_size"];
    let side = |i: usize| size[i].as_u64().filter(|&n| n > 0).map_or(128, |n| n.min(1 << 30) as usize);
    (side(0), side(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_cover_their_range() {
        for (byte, value) in
            [(0, 0.0), (1, 2f32.powi(-9)), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (8, 2f32.powi(-6))]
        {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }

    #[test]
    fn four_bits_come_low_nibble_first() {
        let mut block = [0u8; 16];
        (block[0], block[15]) = (0x72, 0x9f);
        let values = mxfp4(&block, &[128]);
        assert_eq!((values[0], values[1], values[30], values[31]), (2.0, 12.0, -12.0, -1.0));
    }
}

use crate::WEIGHT_BLOCK;

/// What a row's columns stand for once they are rounded to bytes, [`WEIGHT_BLOCK`] of them to a scale
/// (`shared/dot.wgsl`).
pub fn rounded(row: &[f32]) -> Vec<f32> {
    let of_block = |block: &[f32]| {
        let largest = block.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max);
        let factor = factor_of(largest);
        let scale = if factor > 0.0 { 1.0 / factor } else { f32::from_bits(largest) };
        let round = |value: &f32| f32::from((value * factor).round_ties_even() as i8) * scale;
        block.iter().map(round).collect::<Vec<_>>()
    };
    row.chunks(WEIGHT_BLOCK).flat_map(of_block).collect()
}

/// What takes values of at most this size (the bits of a positive f32) to 127 at most.
fn factor_of(largest: u32) -> f32 {
    let exponent = largest >> 23;
    if !(28..252).contains(&exponent) {
        return 0.0;
    }
    let above = (largest >> 15 & 0xff) + 257;
    f32::from_bits((252 - exponent) << 23) * (130_048 / above) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_moves_by_half_a_step_at_most() {
        let row: Vec<f32> =
            (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1.7f32.powi(i / 32 - 1)).collect();
        let back = rounded(&row);
        assert_eq!(back.len(), row.len());
        for (before, after) in row.chunks(WEIGHT_BLOCK).zip(back.chunks(WEIGHT_BLOCK)) {
            let largest = before.iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = before.iter().zip(after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Scales have nine bits: a step may be a hundredth larger than a 127th of the largest value.
            assert!(worst > 0.0 && worst <= 0.5 * 1.01 * largest / 127.0, "{worst} of {largest}");
        }
    }

    #[test]
    fn the_largest_value_takes_a_byte_whatever_it_is() {
        for bits in (0x0e00_0000..0x7e00_0000u32).step_by(7_654_321) {
            let largest = f32::from_bits(bits);
            let bytes = largest * factor_of(bits);
            assert!((125.5..127.01).contains(&bytes), "{largest:e}: {bytes}");
        }
    }

    #[test]
    fn nothing_stays_nothing_and_what_is_no_number_stays_none() {
        assert_eq!(rounded(&[0.0; 40]), [0.0; 40]);
        assert_eq!(rounded(&[1e-35, -1e-36]), [0.0; 2]);
        for none in [f32::NAN, f32::INFINITY] {
            assert!(rounded(&[1.0, none, 2.0]).iter().all(|value| value.is_nan()));
        }
    }
}

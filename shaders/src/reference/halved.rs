use half::f16;

/// What a row stands for once it is scaled by a power of two and rounded to f16 (`shared/cooperative.wgsl`).
pub fn halved(row: &[f32]) -> Vec<f32> {
    let largest = row.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    let exponent = (268 - (largest >> 23).min(254)).clamp(1, 253);
    let (factor, back) = (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
    row.iter().map(|value| f16::from_f32(value * factor).to_f32() * back).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_keeps_eleven_bits_whatever_its_row_is_like() {
        for exponent in [-120, -30, 0, 20, 120] {
            let row: Vec<f32> =
                (1..100).map(|i| (i * 7919 % 1009) as f32 / 1000.0 * 2f32.powi(exponent)).collect();
            for (before, after) in row.iter().zip(halved(&row)) {
                assert!((before - after).abs() <= before / 2048.0, "{before:e} became {after:e}");
            }
        }
    }

    #[test]
    fn nothing_stays_nothing_and_what_is_no_number_stays_none() {
        assert_eq!(halved(&[0.0; 40]), [0.0; 40]);
        assert!(halved(&[1.0, f32::NAN])[1].is_nan());
        assert!(!halved(&[1.0, f32::INFINITY])[1].is_finite());
    }
}

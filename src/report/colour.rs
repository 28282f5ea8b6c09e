//! Colours of the plots: one sequential scale for each theme, computed in OKLCH, and eight rank colours.
//!
//! Scales are CSS variables (`--s0` to `--s31`), so that one drawing serves light and dark pages: on a light
//! page more is darker, on a dark page more is brighter, and zero is always close to the paper.

/// Steps of the sequential scale.
pub(super) const STEPS: usize = 32;

/// How many different rank colours there are; ranks beyond share them.
pub(super) const RANK_COLOURS: usize = 8;

/// Index of the scale's step for `share` in 0..=1.
pub(super) fn step(share: f64) -> usize {
    let clamped = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    (clamped * (STEPS - 1) as f64).round() as usize
}

/// Step from which text on the cell must flip to the paper's colour to stay readable.
pub(super) const FLIP: usize = STEPS / 2;

/// CSS declarations of the scale and of the rank colours for one theme.
pub(super) fn variables(dark: bool) -> String {
    let mut css = String::new();
    for index in 0..STEPS {
        let share = index as f64 / (STEPS - 1) as f64;
        css.push_str(&format!("--s{index}:{};", hex(sequential(share, dark))));
    }
    for rank in 0..RANK_COLOURS {
        css.push_str(&format!("--r{rank}:{};", hex(rank_colour(rank, dark))));
    }
    css
}

/// Viridis-like: lightness linear, hue from yellow through green and blue to violet, chroma highest midway.
fn sequential(share: f64, dark: bool) -> [f64; 3] {
    let (lightness, hue) = if dark {
        (0.22 + 0.66 * share, 292.0 - 187.0 * share)
    } else {
        (0.97 - 0.68 * share, 105.0 + 187.0 * share)
    };
    let arch = (std::f64::consts::PI * (0.04 + 0.84 * share)).sin();
    oklch(lightness, 0.012 + 0.118 * arch, hue)
}

/// Hues apart by eye, lightness alternating, so that neighbours differ without colour too.
fn rank_colour(rank: usize, dark: bool) -> [f64; 3] {
    const HUES: [f64; RANK_COLOURS] = [255.0, 70.0, 165.0, 350.0, 215.0, 110.0, 300.0, 30.0];
    let raised = if rank.is_multiple_of(2) { 0.0 } else { 0.12 };
    let base = if dark { 0.58 } else { 0.62 };
    oklch(base + raised, 0.115, HUES[rank % RANK_COLOURS])
}

/// OKLCH (hue in degrees) to linear-light sRGB, then gamma; out-of-gamut channels are clamped.
fn oklch(lightness: f64, chroma: f64, hue: f64) -> [f64; 3] {
    let (sin, cos) = hue.to_radians().sin_cos();
    let (a, b) = (chroma * cos, chroma * sin);
    let l = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let m = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let s = (lightness - 0.089_484_177_5 * a - 1.291_485_548 * b).powi(3);
    [
        4.076_741_662_1 * l - 3.307_711_591_3 * m + 0.230_969_929_2 * s,
        -1.268_438_004_6 * l + 2.609_757_401_1 * m - 0.341_319_396_5 * s,
        -0.004_196_086_3 * l - 0.703_418_614_7 * m + 1.707_614_701 * s,
    ]
    .map(gamma)
}

fn gamma(linear: f64) -> f64 {
    let linear = linear.clamp(0.0, 1.0);
    if linear <= 0.003_130_8 { 12.92 * linear } else { 1.055 * linear.powf(1.0 / 2.4) - 0.055 }
}

fn hex(rgb: [f64; 3]) -> String {
    let [r, g, b] = rgb.map(|channel| (channel * 255.0).round() as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn luma(rgb: [f64; 3]) -> f64 {
        0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    }

    #[test]
    fn the_scale_is_monotone_in_lightness() {
        for dark in [false, true] {
            let lumas: Vec<f64> = (0..STEPS).map(|i| luma(sequential(i as f64 / 31.0, dark))).collect();
            assert!(lumas.windows(2).all(|pair| (pair[0] < pair[1]) == dark), "{lumas:?}");
        }
    }

    #[test]
    fn steps_stay_in_range_whatever_comes_in() {
        assert_eq!(step(f64::NAN), 0);
        assert_eq!(step(-1.0), 0);
        assert_eq!(step(7.0), STEPS - 1);
    }

    #[test]
    fn greys_come_out_grey() {
        assert_eq!(hex(oklch(1.0, 0.0, 0.0)), "#ffffff");
        assert_eq!(hex(oklch(0.0, 0.0, 0.0)), "#000000");
    }
}

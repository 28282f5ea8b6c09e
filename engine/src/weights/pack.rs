//! From f32 rows to the units of 16 bytes that the matrix kernels read (`shared/weight.wgsl`), and back.

use exflow_shaders::{WEIGHT_BLOCK, Weights};
use half::f16;

/// 16 bytes of a row.
pub(crate) type Unit = [u32; 4];

/// Rows of values that follow each other in matrices of `height` rows (whole vec4s) and `columns` columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) height: usize,
    pub(crate) columns: usize,
}

/// Matrices in a form, in the order of `shared/weight.wgsl`; or the value that the form cannot hold.
pub(crate) fn pack(form: Weights, values: &[f32], shape: Shape) -> Result<Vec<Unit>, f32> {
    let (weight_units, stride) = form.units(shape.columns);
    let mut rows = vec![[0u32; 4]; values.len() / shape.columns * stride];
    for (row, to) in values.chunks_exact(shape.columns).zip(rows.chunks_exact_mut(stride)) {
        let words: &mut [u32] = bytemuck::cast_slice_mut(to);
        match form {
            Weights::F32 => words.iter_mut().zip(row).for_each(|(word, v)| *word = v.to_bits()),
            Weights::F16 => {
                for (word, two) in words.iter_mut().zip(row.chunks(2)) {
                    *word = pair(half_of(two[0])?, half_of(two.get(1).copied().unwrap_or(0.0))?);
                }
            }
            Weights::Q8 | Weights::Q4 | Weights::Mx4 => {
                let (weights, scales) = words.split_at_mut(4 * weight_units);
                match form {
                    Weights::Mx4 => pack_mx4(row, weights, scales),
                    _ => pack_blocks(form, row, weights, scales)?,
                }
            }
        }
    }
    let mut units = vec![[0u32; 4]; rows.len()];
    for (to, from) in order(rows.len() / stride, shape.height, stride).enumerate() {
        units[to] = rows[from];
    }
    Ok(units)
}

/// Which unit of rows that follow each other stands at each place of the device's order: blocks of eight vec4s of
/// rows, unit by unit, the first rows of the vec4s before the second ones.
fn order(rows: usize, height: usize, stride: usize) -> impl Iterator<Item = usize> {
    let blocks = (0..rows).step_by(height.max(1)).flat_map(move |matrix| {
        (0..height).step_by(32).map(move |first| (matrix + first, 32.min(height - first)))
    });
    blocks.flat_map(move |(first, count)| {
        (0..stride).flat_map(move |unit| {
            let rows = (0..4).flat_map(move |j| (j..count).step_by(4));
            rows.map(move |row| (first + row) * stride + unit)
        })
    })
}

/// Blocks of 32 as llama.cpp's q8_0 and q4_0 round them: the largest value decides the scale, which is f16.
fn pack_blocks(form: Weights, row: &[f32], weights: &mut [u32], scales: &mut [u32]) -> Result<(), f32> {
    let per_block = WEIGHT_BLOCK * 4 / form.per_unit();
    for (index, (block, words)) in
        row.chunks(WEIGHT_BLOCK).zip(weights.chunks_exact_mut(per_block)).enumerate()
    {
        let largest = block.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
        let scale = if form == Weights::Q8 { largest.abs() / 127.0 } else { largest / -8.0 };
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        scales[index / 2] |= u32::from(half_of(scale)?) << (16 * (index % 2));
        for (i, value) in block.iter().enumerate() {
            if form == Weights::Q8 {
                let byte = (value * inverse).round().clamp(-127.0, 127.0) as i8;
                words[i / 4] |= u32::from(byte as u8) << (8 * (i % 4));
            } else {
                let nibble = (value * inverse + 8.5).clamp(0.0, 15.0) as u32;
                words[i / 8] |= nibble << (8 * (i % 4) + 4 * (i / 4 % 2));
            }
        }
        // Columns beyond the row stand for 0.
        for i in (block.len()..WEIGHT_BLOCK).filter(|_| form == Weights::Q4) {
            words[i / 8] |= 8 << (8 * (i % 4) + 4 * (i / 4 % 2));
        }
    }
    Ok(())
}

/// What the low three bits of an E2M1 number stand for.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Blocks of 32 as MXFP4 has them, with the power of two that gives the largest value the largest exponent. What MXFP4
/// stands for comes back as it was: with another scale, perhaps, and the same numbers.
fn pack_mx4(row: &[f32], weights: &mut [u32], scales: &mut [u32]) {
    for (index, (block, words)) in row.chunks(WEIGHT_BLOCK).zip(weights.chunks_exact_mut(4)).enumerate() {
        let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        let exponent = (largest.to_bits() >> 23) as i32 - 127 - 2;
        let scale = 2f64.powi(exponent.max(-127));
        scales[index / 2] |= (scale as f32).to_bits() >> 16 << (16 * (index % 2));
        for (i, value) in block.iter().enumerate() {
            let size = (f64::from(value.abs()) / scale) as f32;
            let nearest = (1..8).fold(0, |best, code| {
                if (E2M1[code] - size).abs() < (E2M1[best] - size).abs() { code } else { best }
            });
            let nibble = nearest as u32 | u32::from(*value < 0.0) << 3;
            words[i / 8] |= nibble << (8 * (i % 4) + 4 * (i / 4 % 2));
        }
    }
}

fn half_of(value: f32) -> Result<u16, f32> {
    let half = f16::from_f32(value);
    if half.is_finite() { Ok(half.to_bits()) } else { Err(value) }
}

fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// The numbers that packed matrices stand for.
pub(crate) fn unpack(form: Weights, units: &[Unit], shape: Shape) -> Vec<f32> {
    let columns = shape.columns;
    let (weight_units, stride) = form.units(columns);
    let mut rows = vec![[0u32; 4]; units.len()];
    for (from, to) in order(units.len() / stride, shape.height, stride).enumerate() {
        rows[to] = units[from];
    }
    let mut values = Vec::with_capacity(units.len() / stride * columns);
    for row in rows.chunks_exact(stride) {
        let words: &[u32] = bytemuck::cast_slice(row);
        let (weights, scales) = words.split_at(4 * weight_units);
        let half = |words: &[u32], i: usize| f16::from_bits((words[i / 2] >> (16 * (i % 2))) as u16).to_f32();
        let value = |i: usize| match form {
            Weights::F32 => f32::from_bits(weights[i]),
            Weights::F16 => half(weights, i),
            Weights::Q8 => {
                let byte = (weights[i / 4] >> (8 * (i % 4))) as u8 as i8;
                f32::from(byte) * half(scales, i / WEIGHT_BLOCK)
            }
            Weights::Q4 => {
                let nibble = weights[i / 8] >> (8 * (i % 4) + 4 * (i / 4 % 2)) & 15;
                (nibble as f32 - 8.0) * half(scales, i / WEIGHT_BLOCK)
            }
            Weights::Mx4 => {
                let nibble = weights[i / 8] >> (8 * (i % 4) + 4 * (i / 4 % 2)) & 15;
                let size = E2M1[(nibble & 7) as usize] * if nibble & 8 == 0 { 1.0 } else { -1.0 };
                let block = i / WEIGHT_BLOCK;
                size * f32::from_bits(scales[block / 2] >> (16 * (block % 2)) << 16)
            }
        };
        values.extend((0..columns).map(value));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { height: 44, columns: 36 };

    fn rows() -> Vec<f32> {
        (0..44 * 36).map(|i| ((i * 37 % 101) as f32 - 50.0) / 61.0).collect()
    }

    #[test]
    fn what_is_packed_comes_back_within_half_a_step() {
        for (form, step) in [
            (Weights::F32, 0.0),
            (Weights::F16, 0.001),
            (Weights::Q8, 0.007),
            (Weights::Q4, 0.11),
            (Weights::Mx4, 0.2),
        ] {
            let packed = pack(form, &rows(), SHAPE).expect("fits");
            let back = unpack(form, &packed, SHAPE);
            let worst = rows().iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= step, "{form:?}: {worst}");
            assert!(form == Weights::F32 || worst > 0.0, "{form:?} is no rounding at all");
        }
    }

    #[test]
    fn eight_vec4s_of_rows_stand_side_by_side() {
        let order: Vec<usize> = order(44, 44, 2).collect();
        assert_eq!(order[..10], [0, 8, 16, 24, 32, 40, 48, 56, 2, 10]);
        assert_eq!(order[32], 1, "the second units of the first block");
        assert_eq!(order[64..68], [64, 72, 80, 66], "three vec4s of rows are left");
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..88), "every unit once");
    }

    #[test]
    fn what_mxfp4_stands_for_comes_back_as_it_was() {
        // Every scale but the one that is no number, with each of the values as the largest of a block.
        for exponent in -127..=127 {
            for largest in 0..8 {
                let scale = 2f64.powi(exponent);
                let value = |i: usize| {
                    let size = f64::from(E2M1[(i * 5 + i / 8) % (largest + 1)]) * scale;
                    (if i.is_multiple_of(3) { -size } else { size }) as f32
                };
                let row: Vec<f32> = (0..4 * 64).map(value).collect();
                if row.iter().any(|v| !v.is_finite()) {
                    continue;
                }
                let shape = Shape { height: 4, columns: 64 };
                let packed = pack(Weights::Mx4, &row, shape).expect("fits");
                assert_eq!(unpack(Weights::Mx4, &packed, shape), row, "2^{exponent}, {largest}");
            }
        }
    }

    #[test]
    fn a_value_beyond_f16_is_named() {
        let one = Shape { height: 4, columns: 1 };
        assert_eq!(pack(Weights::F16, &[1.0, 1e6, 0.0, 0.0], one), Err(1e6));
        assert!(pack(Weights::F32, &[1.0, 1e6, 0.0, 0.0], one).is_ok());
    }
}

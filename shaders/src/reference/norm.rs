use crate::NO_SLOT;
use crate::params::Norm;

/// `y[t] = norm(x[t]) * weight (+ bias)` of `count` rows over the first `width` columns; LayerNorm where centred, else
/// RMSNorm. Where it combines, `x[t] = rows[source[t]] + partials[slots[t, 0]] + …` first, in router order;
/// [`NO_SLOT`] adds nothing.
#[allow(clippy::too_many_arguments, reason = "one per binding")]
pub fn norm(
    p: &Norm,
    count: usize,
    rows: &[f32],
    source: &[u32],
    slots: &[u32],
    partials: &[f32],
    weight: &[f32],
    bias: &[f32],
    x: &mut [f32],
    y: &mut [f32],
) {
    let (stride, first, top_k) = (p.width4 as usize * 4, p.first_row as usize, p.top_k as usize);
    for row in first..first + count {
        if p.combines != 0 {
            for column in 0..stride {
                let mut sum = rows[source[row] as usize * stride + column];
                for &slot in slots[row * top_k..][..top_k].iter().filter(|&&slot| slot != NO_SLOT) {
                    sum += partials[slot as usize * stride + column];
                }
                x[row * stride + column] = sum;
            }
        }
        let input = &x[row * stride..row * stride + p.width as usize];
        let mean = if p.centred != 0 { input.iter().sum::<f32>() / p.width as f32 } else { 0.0 };
        let square = input.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / p.width as f32;
        let scale = 1.0 / (square + p.eps).sqrt();
        for column in 0..stride {
            let value = (x[row * stride + column] - mean) * scale * weight[column];
            y[row * stride + column] = if p.centred != 0 { value + bias[column] } else { value };
        }
    }
}

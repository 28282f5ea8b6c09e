use crate::params::Norm;

/// `y[t] = norm(x[t]) * weight (+ bias)` over the first `width` columns of a row; LayerNorm where centred, else
/// RMSNorm.
pub fn norm(p: &Norm, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
    let stride = p.width4 as usize * 4;
    for row in p.first_row as usize..(p.first_row + p.rows) as usize {
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

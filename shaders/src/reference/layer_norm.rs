use crate::params::LayerNorm;

/// `y[t] = (x[t] - mean) / sqrt(variance + eps) * weight + bias` over the first `width` columns of a row.
pub fn layer_norm(p: &LayerNorm, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
    let stride = p.width4 as usize * 4;
    for row in p.first_row as usize..(p.first_row + p.rows) as usize {
        let input = &x[row * stride..row * stride + p.width as usize];
        let mean = input.iter().sum::<f32>() / p.width as f32;
        let variance = input.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / p.width as f32;
        let scale = 1.0 / (variance + p.eps).sqrt();
        for column in 0..stride {
            y[row * stride + column] =
                (x[row * stride + column] - mean) * scale * weight[column] + bias[column];
        }
    }
}

use crate::params::Embed;

/// `x[t] = wte[token] * scale (+ wpe[position])`; `tokens` `[T]` of (token id, position), `wte` `[4 * height4, H]` the rows of
/// the tokens from `first` on, `wpe` `[.., H]`, `sampled` `[T]` of ids in their place where rows follow those of the step before,
/// `x` `[T, H]`, whose rows of other tokens stay.
pub fn embed(p: &Embed, tokens: &[[u32; 2]], wte: &[f32], wpe: &[f32], sampled: &[u32], x: &mut [f32]) {
    let width = p.width4 as usize * 4;
    for (row, token) in tokens.iter().enumerate().take(p.rows as usize) {
        let id = if p.follows != 0 { sampled[row] } else { token[0] };
        if !(p.first..p.first + 4 * p.height4).contains(&id) {
            continue;
        }
        for column in 0..width {
            let mut value = wte[(id - p.first) as usize * width + column] * p.scale;
            if p.has_positions != 0 {
                value += wpe[token[1] as usize * width + column];
            }
            x[row * width + column] = value;
        }
    }
}

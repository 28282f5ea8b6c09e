use crate::params::Rope;

/// Turns columns `(first + i, first + half + i)` of every head in place; `turns` `[T, half]` of (cosine, sine).
pub fn rope(p: &Rope, turns: &[[f32; 2]], x: &mut [f32]) {
    let half = p.half as usize;
    for row in 0..p.rows as usize {
        for head in 0..p.heads as usize {
            let first =
                row * p.stride as usize + p.offset as usize + head * p.head as usize + p.first as usize;
            for pair in 0..half {
                let [cosine, sine] = turns[row * half + pair];
                let (a, b) = (x[first + pair], x[first + half + pair]);
                x[first + pair] = a * cosine - b * sine;
                x[first + half + pair] = b * cosine + a * sine;
            }
        }
    }
}

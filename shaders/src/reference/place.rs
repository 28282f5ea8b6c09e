use crate::Cache;
use crate::params::Place;

/// Norms queries and keys of `x` `[T, stride]` in place, clamps all, turns pairs of columns by `turns` `[T, half]` of (cosine, sine), and
/// writes keys and values as words of `form` to `cache[slot[t]]`; `parts` of a row, queries' first.
#[allow(clippy::too_many_arguments, reason = "one per binding")]
pub fn place(
    p: &Place,
    parts: usize,
    form: Cache,
    q_weight: &[f32],
    k_weight: &[f32],
    turns: &[[f32; 2]],
    slots: &[u32],
    x: &mut [f32],
    cache: &mut [u32],
) {
    let (d, normed, half) = (p.d4 as usize * 4, p.normed4 as usize * 4, p.half as usize);
    let (q_heads, k_heads) = (p.q_heads as usize, p.k_heads as usize);
    let (stride, offset, width) = (p.stride4 as usize * 4, p.offset4 as usize * 4, p.cache4 as usize * 4);
    let q_parts = q_heads / p.q_span as usize;
    for (row, &slot) in slots.iter().enumerate().take(x.len() / stride) {
        for part in 0..parts {
            let is_query = part < q_parts;
            let (heads, head, weight) = match is_query {
                true => (p.q_span as usize, part * p.q_span as usize, q_weight),
                false => (p.k_span as usize, q_heads + (part - q_parts) * p.k_span as usize, k_weight),
            };
            let is_value = head >= q_heads + k_heads;
            let x = &mut x[row * stride + offset + head * d..][..heads * d];
            if normed > 0 && !is_value && (!is_query || p.norms_queries != 0) {
                let squares = x.chunks_exact(d).flat_map(|head| &head[..normed]).map(|v| v * v).sum::<f32>();
                let scale = 1.0 / (squares / (heads * p.normed as usize) as f32 + p.eps).sqrt();
                for (head, weight) in x.chunks_exact_mut(d).zip(weight.chunks_exact(normed)) {
                    head.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
                }
            }
            x.iter_mut().filter(|_| p.clips != 0).for_each(|v| *v = v.clamp(-p.limit, p.limit));
            for head in x.chunks_exact_mut(d).filter(|_| !is_value) {
                let turned = &mut head[p.first as usize..];
                for (pair, [cosine, sine]) in turns.iter().skip(row * half).take(half).enumerate() {
                    let (a, b) = (turned[pair], turned[half + pair]);
                    turned[pair] = a * cosine - b * sine;
                    turned[half + pair] = b * cosine + a * sine;
                }
            }
        }
        if p.appends != 0 {
            let from = row * stride + offset + q_heads * d;
            let part = p.part4 as usize * form.texel_words() as usize;
            for (i, word) in form.pack(&x[from..][..width]).into_iter().enumerate() {
                cache[form.place(width, part, (slot as usize, i))] = word;
            }
        }
    }
}

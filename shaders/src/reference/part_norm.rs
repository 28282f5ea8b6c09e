use crate::params::PartNorm;

/// RMSNorm in place of `parts` parts of every row of `x` `[T, stride]`; `weight` is one part's.
pub fn part_norm(p: &PartNorm, parts: usize, weight: &[f32], x: &mut [f32]) {
    let (stride, offset, part) = (p.stride4 as usize * 4, p.offset4 as usize * 4, p.part4 as usize * 4);
    for row in x.chunks_exact_mut(stride) {
        for values in row[offset..offset + parts * part].chunks_exact_mut(part) {
            let square = values.iter().map(|v| v * v).sum::<f32>() / p.width as f32;
            let scale = 1.0 / (square + p.eps).sqrt();
            values.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
        }
    }
}

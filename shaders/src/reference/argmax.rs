use crate::params::Argmax;

/// The index of the largest logit of each row, the lower one among equals; `logits` `[T, stride]`.
pub fn argmax(p: &Argmax, logits: &[f32], chosen: &mut [u32]) {
    for (row, best) in chosen.iter_mut().enumerate() {
        let values = &logits[row * p.stride as usize..][..p.vocab as usize];
        let largest = (1..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best });
        *best = largest as u32;
    }
}

use crate::Weights;
use crate::params::Probe;

/// `out[i]` is the sum of 16 chains after `rounds` multiply-adds of each; with [`Weights::Q8`] products of four bytes.
pub fn probe(p: &Probe, weights: Weights, out: &mut [[f32; 4]]) {
    for (i, value) in out.iter_mut().enumerate() {
        let mut sum = 0.0;
        for chain in 0..16 {
            let first = (i % 64 + chain) as u32;
            sum += match weights {
                Weights::Q8 => (0..p.rounds).fold(first as i32, |v, _| dot4(v as u32, p.bytes)) as f32,
                _ => (0..p.rounds).fold(first as f32, |v, _| v.mul_add(p.factor, 1.0)),
            };
        }
        *value = [sum; 4];
    }
}

/// The sum of the products of four signed bytes each.
fn dot4(a: u32, b: u32) -> i32 {
    a.to_le_bytes().iter().zip(b.to_le_bytes()).map(|(&a, b)| i32::from(a as i8) * i32::from(b as i8)).sum()
}

use crate::NO_SLOT;
use crate::params::Combine;

/// `out[t] = rows[source[t]] + partials[slots[t, 0]] + …`, in router order; [`NO_SLOT`] adds nothing.
pub fn combine(p: &Combine, rows: &[f32], source: &[u32], slots: &[u32], partials: &[f32], out: &mut [f32]) {
    let (h, top_k) = (p.h4 as usize * 4, p.top_k as usize);
    for row in 0..p.rows as usize {
        for column in 0..h {
            let mut sum = rows[source[row] as usize * h + column];
            for &slot in slots[row * top_k..][..top_k].iter().filter(|&&slot| slot != NO_SLOT) {
                sum += partials[slot as usize * h + column];
            }
            out[row * h + column] = sum;
        }
    }
}

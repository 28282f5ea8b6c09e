use crate::params::Clip;

/// Clamps `x` in place, on both sides.
pub fn clip(p: &Clip, x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = v.clamp(-p.limit, p.limit));
}

use crate::params::KvAppend;

/// `cache[slot[t]] = source[t, offset ..]`; a cache row is the keys, then the values of every head.
pub fn kv_append(p: &KvAppend, source: &[f32], slots: &[u32], cache: &mut [f32]) {
    let (width, stride, offset) = (p.width4 as usize * 4, p.stride4 as usize * 4, p.offset4 as usize * 4);
    for (row, &slot) in slots.iter().enumerate().take(p.rows as usize) {
        let from = &source[row * stride + offset..][..width];
        cache[slot as usize * width..][..width].copy_from_slice(from);
    }
}

use crate::Cache;
use crate::params::KvAppend;

/// `cache[slot[t]] = source[t, offset ..]`; a cache row is the keys, then the values of every head, as words of `form`.
pub fn kv_append(p: &KvAppend, form: Cache, source: &[f32], slots: &[u32], cache: &mut [u32]) {
    let (width, stride, offset) = (p.width4 as usize * 4, p.stride4 as usize * 4, p.offset4 as usize * 4);
    for (row, &slot) in slots.iter().enumerate().take(p.rows as usize) {
        let from = &source[row * stride + offset..][..width];
        let words = form.words(width);
        cache[slot as usize * words..][..words].copy_from_slice(&form.pack(from));
    }
}

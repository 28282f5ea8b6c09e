// Writes keys and values of some rows into the paged cache: cache[slot[t]] = source[t, offset ..].
struct Params {
    rows: u32,     // T
    width4: u32,   // of a cache row: keys, then values, of every key head
    stride4: u32,  // of a source row
    offset4: u32,  // of the keys within it
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<f32>>;      // [T, stride/4]
@group(0) @binding(2) var<storage, read> slots: array<u32>;             // [T] position within the cache
@group(0) @binding(3) var<storage, read_write> cache: array<vec4<f32>>; // [slots, width/4]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.y;
    if column >= p.width4 || row >= p.rows {
        return;
    }
    cache[slots[row] * p.width4 + column] = source[row * p.stride4 + p.offset4 + column];
}

// Rotary positions in place: columns (first + i, first + half + i) of every head turn by the angle of pair i.
// Models whose pairs are neighbours have their weights' rows reordered when they are loaded.
struct Params {
    rows: u32,     // T
    heads: u32,    // query heads and, behind them, key heads
    stride: u32,   // columns per row of x
    offset: u32,   // of the first head
    head: u32,     // columns per head
    first: u32,    // first column of a head that turns
    half: u32,     // pairs
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> turns: array<vec2<f32>>; // [T, half] cosine, sine
@group(0) @binding(2) var<storage, read_write> x: array<f32>;     // [T, stride]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.heads * p.half {
        return;
    }
    let pair = id.x % p.half;
    let low = id.y * p.stride + p.offset + id.x / p.half * p.head + p.first + pair;
    let high = low + p.half;
    let turn = turns[id.y * p.half + pair];
    let a = x[low];
    let b = x[high];
    x[low] = a * turn.x - b * turn.y;
    x[high] = b * turn.x + a * turn.y;
}

// out[t] = rows[source[t]] + partials[slots[t, 0]] + ... + partials[slots[t, K-1]], added in router order
// wherever the partials were made; with K = 0 it gathers rows.
struct Params {
    rows: u32,   // T
    h4: u32,     // H / 4
    top_k: u32,  // K
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<f32>>;      // [.., H/4] residual stream
@group(0) @binding(2) var<storage, read> source: array<u32>;          // [T] row of the residual
@group(0) @binding(3) var<storage, read> slots: array<u32>;           // [T, K] row of the partial; NONE: add nothing
@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;  // [slots, H/4]
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>; // [T, H/4]

override WORKGROUP: u32 = 32u;
const NONE: u32 = 0xffffffffu;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.y;
    if column >= p.h4 || row >= p.rows {
        return;
    }
    var sum = rows[source[row] * p.h4 + column];
    for (var k = 0u; k < p.top_k; k++) {
        let slot = slots[row * p.top_k + k];
        if slot != NONE {
            sum += partials[slot * p.h4 + column];
        }
    }
    out[row * p.h4 + column] = sum;
}

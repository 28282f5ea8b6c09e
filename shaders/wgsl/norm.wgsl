// y[t] = norm(x[t]) * weight (+ bias) over the first `width` columns, one workgroup a row. LayerNorm subtracts the
// mean, RMSNorm does not. Where it combines, x is made first: x[t] = rows[source[t]] + partials[slots[t, 0]] + .. +
// partials[slots[t, K-1]], added in router order wherever the partials were made; with K = 0 it gathers rows.
import package::shared::row::{LANES, spread, x}; // binding 7: x [.., H/4], the residual stream

struct Params {
    width: u32,     // H; columns beyond it are 0 in x and in weight
    width4: u32,    // ceil(H / 4)
    first_row: u32, // the rows first_row, first_row + 1, .. of x are normed
    combines: u32,  // 0: x is there
    top_k: u32,     // K
    centred: u32,   // 1: LayerNorm, 0: RMSNorm
    eps: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<f32>>;      // [.., H/4] residual stream before, if it combines
@group(0) @binding(2) var<storage, read> source: array<u32>;          // [T] row of it
@group(0) @binding(3) var<storage, read> slots: array<u32>;           // [T, K] row of the partial; NONE: add nothing
@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;  // [slots, H/4]
@group(0) @binding(5) var<storage, read> weight: array<vec4<f32>>;    // [H/4]
@group(0) @binding(6) var<storage, read> bias: array<vec4<f32>>;      // [H/4], any buffer where not centred
@group(0) @binding(8) var<storage, read_write> y: array<vec4<f32>>;   // [.., H/4]

const NONE: u32 = 0xffffffffu;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = p.first_row + group.x;
    let base = row * p.width4;
    // What a lane writes of x is what it reads later on.
    if p.combines != 0u {
        let from_row = source[row] * p.width4;
        for (var i = lane; i < p.width4; i += LANES) {
            var sum = rows[from_row + i];
            for (var k = 0u; k < p.top_k; k++) {
                let slot = slots[row * p.top_k + k];
                if slot != NONE {
                    sum += partials[slot * p.width4 + i];
                }
            }
            x[base + i] = sum;
        }
    }
    let s = spread(base, p.width, p.width4, p.centred != 0u, p.eps, lane);
    for (var i = lane; i < p.width4; i += LANES) {
        var value = (x[base + i] - vec4<f32>(s.mean)) * s.scale * weight[i];
        if p.centred != 0u {
            value += bias[i];
        }
        y[base + i] = value;
    }
}

// y[t, n] = (x[t] . w[n] (+ bias[n])) * scale (+ residual[t, n]); a lane makes TILE_ROWS rows of four columns. Rows of
// x and y may be parts of wider rows. With several heads (workgroups along z) each has its own w, and its own
// stretch of x and y.
import package::shared::tile::{TILE_ROWS, accumulate};
import package::shared::weight::{Weights, widen};

struct Params {
    rows: u32,          // T
    k4: u32,            // K / 4, the inner dimension
    n4: u32,            // ceil(N / 4); rows of w beyond N are 0
    x_stride4: u32,     // of a row of x
    x_head4: u32,       // from a head's stretch of x to the next
    y_stride4: u32,     // of a row of y and residual
    y_offset4: u32,     // of the first head's stretch
    y_head4: u32,       // from a head's stretch of y to the next
    has_bias: u32,
    has_residual: u32,
    scale: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;        // [T, x_stride/4]
@group(0) @binding(2) var<storage, read> w: array<Weights>;          // [heads, N, K/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;     // [heads, N/4], any buffer without a bias
@group(0) @binding(4) var<storage, read> residual: array<vec4<f32>>; // as y, any buffer without a residual
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;  // [T, y_stride/4]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.x * WORKGROUP + lane;
    if column >= p.n4 {
        return;
    }
    let head = group.z;
    let first = group.y * TILE_ROWS;
    let last = p.rows - 1u;
    var acc: array<vec4<f32>, TILE_ROWS>;
    let x_base = head * p.x_head4;
    let w_base = (head * p.n4 + column) * 4u * p.k4;
    for (var k = 0u; k < p.k4; k++) {
        let w0 = widen(w[w_base + k]);
        let w1 = widen(w[w_base + p.k4 + k]);
        let w2 = widen(w[w_base + 2u * p.k4 + k]);
        let w3 = widen(w[w_base + 3u * p.k4 + k]);
        for (var r = 0u; r < TILE_ROWS; r++) {
            acc[r] = accumulate(acc[r], x[min(first + r, last) * p.x_stride4 + x_base + k], w0, w1, w2, w3);
        }
    }
    let y_base = p.y_offset4 + head * p.y_head4 + column;
    for (var r = 0u; r < TILE_ROWS; r++) {
        if first + r <= last {
            var value = acc[r];
            if p.has_bias != 0u {
                value += bias[head * p.n4 + column];
            }
            value *= p.scale;
            let at = (first + r) * p.y_stride4 + y_base;
            if p.has_residual != 0u {
                value += residual[at];
            }
            y[at] = value;
        }
    }
}

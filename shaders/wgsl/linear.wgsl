// y[t, n] = (x[t] . w[n] (+ bias[n])) * scale (+ residual[t, n]); a lane makes a tile. Rows of x and y may
// be parts of wider rows. With several heads (workgroups along z) each has its own w, and its own
// stretch of x and y.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, row_of};
import package::shared::weight::{column_start, column_step};
import package::shared::product::product; // binding 1: x [T, x_stride/4], binding 2: w [heads, N, ..]

struct Params {
    rows: u32,          // T
    k4: u32,            // K / 4, the inner dimension
    n4: u32,            // ceil(N / 4); rows of w beyond N are 0
    w_units: u32,       // units of weights in a row of w
    w_stride: u32,      // units of a row of w, those of its scales included
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
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;     // [heads, N/4], any buffer without a bias
@group(0) @binding(4) var<storage, read> residual: array<vec4<f32>>; // as y, any buffer without a residual
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;  // [T, y_stride/4]

override WORKGROUP: u32 = 32u;

// Tiles of rows along x, which is the fastest: those of the same columns follow each other and find the weights in a cache.
@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.z;
    let first = group.x * TILE_ROWS;
    let last = p.rows - 1u;
    var starts: Starts;
    for (var l = 0u; l < LOADS; l++) {
        starts[l] = min(first + row_of(l, lane), last) * p.x_stride4 + head * p.x_head4;
    }
    // Lanes beyond the last column work on it again, as lanes need each other.
    var columns: PerColumn;
    var w_at: PerColumn;
    var steps: PerColumn;
    for (var c = 0u; c < COLUMNS; c++) {
        columns[c] = (group.y * COLUMNS + c) * WORKGROUP + lane;
        let column = min(columns[c], p.n4 - 1u);
        w_at[c] = head * p.n4 * 4u * p.w_stride + column_start(column, p.w_stride);
        steps[c] = column_step(column, p.n4);
    }
    var sums: Sums;
    product(&sums, starts, w_at, steps, p.w_units, p.k4, lane);
    for (var c = 0u; c < COLUMNS; c++) {
        let column = columns[c];
        if column >= p.n4 {
            continue;
        }
        var added = vec4<f32>(0.0);
        if p.has_bias != 0u {
            added = bias[head * p.n4 + column];
        }
        for (var r = 0u; r < TILE_ROWS; r++) {
            if first + r <= last {
                var value = (sums[c][r] + added) * p.scale;
                let at = (first + r) * p.y_stride4 + p.y_offset4 + head * p.y_head4 + column;
                if p.has_residual != 0u {
                    value += residual[at];
                }
                y[at] = value;
            }
        }
    }
}

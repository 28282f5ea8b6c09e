// The splits of each token's attention, which `attention.wgsl` made one by one, merged in order: one workgroup per
// (token, head).
import package::shared::split::{SPLIT, add_denominator, add_values, shares};

struct Params {
    v4: u32,         // of a value
    splits: u32,     // of the longest context
    window: u32,     // positions that a token sees, its own included
    has_sinks: u32,
}
struct Query {
    position: u32,
    table_row: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
// [T, heads, splits, 1 + v4]: largest score and denominator of a split, then its weighted values
@group(0) @binding(1) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> queries: array<Query>;       // [T]
@group(0) @binding(3) var<storage, read> sinks: array<f32>;           // [heads], any buffer without
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>; // [T, heads * v4]

const LANES: u32 = 32u;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.x;
    let position = queries[group.y].position;
    let first = position + 1u - min(position + 1u, p.window);
    let count = position / SPLIT - first / SPLIT + 1u;
    let row = group.y * groups.x + head;
    for (var column = lane; column < p.v4; column += LANES) {
        var largest = -3.0e38;
        var denominator = 0.0;
        if p.has_sinks != 0u {
            largest = sinks[head];
            denominator = 1.0;
        }
        var sum = vec4<f32>(0.0);
        for (var split = 0u; split < count; split++) {
            let base = (row * p.splits + split) * (1u + p.v4);
            let s = shares(largest, parts[base].x);
            largest = s.largest;
            denominator = add_denominator(s, denominator, parts[base].y);
            sum = add_values(s, sum, parts[base + 1u + column]);
        }
        out[row * p.v4 + column] = sum / denominator;
    }
}

// y[t] = (x[t] - mean) / sqrt(variance + eps) * weight + bias, one workgroup a row.
// Order: lane i sums elements i, i + LANES, ...; the lanes' sums are added in lane order.
struct Params {
    rows: u32,       // T
    width: u32,      // H
    width4: u32,     // ceil(H / 4); what pads a row is 0 in x, weight and bias
    first_row: u32,  // of x and y alike
    eps: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [.., H/4]
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;  // [H/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;    // [H/4]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>; // [.., H/4]

const LANES: u32 = 32u;
var<workgroup> partial: array<f32, 32>;

fn sum_over_lanes() -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < LANES; i++) {
        sum += partial[i];
    }
    return sum;
}

// 1 in the columns that exist, 0 in the padding.
fn mask(column4: u32) -> vec4<f32> {
    let column = vec4<u32>(column4 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(0.0), vec4<f32>(1.0), column < vec4<u32>(p.width));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = (p.first_row + group.x) * p.width4;
    var sum = 0.0;
    for (var c = lane; c < p.width4; c += LANES) {
        let v = x[base + c];
        sum += (v.x + v.y) + (v.z + v.w);
    }
    partial[lane] = sum;
    workgroupBarrier();
    let mean = sum_over_lanes() / f32(p.width);
    workgroupBarrier();

    var squares = 0.0;
    for (var c = lane; c < p.width4; c += LANES) {
        let v = (x[base + c] - vec4<f32>(mean)) * mask(c);
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    partial[lane] = squares;
    workgroupBarrier();
    let scale = 1.0 / sqrt(sum_over_lanes() / f32(p.width) + p.eps);

    for (var c = lane; c < p.width4; c += LANES) {
        y[base + c] = (x[base + c] - vec4<f32>(mean)) * scale * weight[c] + bias[c];
    }
}

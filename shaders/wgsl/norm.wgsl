// y[t] = norm(x[t]) * weight (+ bias) over the first `width` columns, one workgroup a row. LayerNorm subtracts the
// mean, RMSNorm does not. The order of the sums is fixed by LANES.
struct Params {
    rows: u32,      // T
    width: u32,     // H; columns beyond it are 0 in x and in weight
    width4: u32,    // ceil(H / 4)
    first_row: u32, // rows first_row .. first_row + rows are normed
    centred: u32,   // 1: LayerNorm, 0: RMSNorm
    eps: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [.., H/4]
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;  // [H/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;    // [H/4], any buffer where not centred
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>; // [.., H/4]

const LANES: u32 = 32u;
var<workgroup> partial: array<f32, 32>;

fn total(lane: u32, value: f32) -> f32 {
    partial[lane] = value;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < LANES; i++) {
        sum += partial[i];
    }
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = (p.first_row + group.x) * p.width4;
    var mean = 0.0;
    if p.centred != 0u {
        var sum = 0.0;
        for (var i = lane; i < p.width4; i += LANES) {
            let v = x[base + i];
            sum += (v.x + v.y) + (v.z + v.w);
        }
        mean = total(lane, sum) / f32(p.width);
    }
    var squares = 0.0;
    for (var i = lane; i < p.width4; i += LANES) {
        // Columns beyond the width count as the mean.
        let column = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
        let d = select(vec4<f32>(0.0), x[base + i] - vec4<f32>(mean), column < vec4<u32>(p.width));
        squares += (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
    }
    let scale = 1.0 / sqrt(total(lane, squares) / f32(p.width) + p.eps);
    for (var i = lane; i < p.width4; i += LANES) {
        var value = (x[base + i] - vec4<f32>(mean)) * scale * weight[i];
        if p.centred != 0u {
            value += bias[i];
        }
        y[base + i] = value;
    }
}

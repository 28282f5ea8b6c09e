// RMSNorm in place of parts of rows: each of `parts` stretches of `part4` vec4s that follow each other from
// `offset4` on (a head's queries or keys, a whole projection, a latent), one workgroup a (row, part).
struct Params {
    stride4: u32,  // of a row
    offset4: u32,  // of the first part
    part4: u32,    // vec4s per part
    width: u32,    // columns per part without padding, which is 0 in x and weight
    eps: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>;  // [part4]
@group(0) @binding(2) var<storage, read_write> x: array<vec4<f32>>; // [T, stride4]

const LANES: u32 = 32u;
var<workgroup> partial: array<f32, 32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = group.y * p.stride4 + p.offset4 + group.x * p.part4;
    var squares = 0.0;
    for (var i = lane; i < p.part4; i += LANES) {
        let v = x[base + i];
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    partial[lane] = squares;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < LANES; i++) {
        sum += partial[i];
    }
    let scale = 1.0 / sqrt(sum / f32(p.width) + p.eps);
    for (var i = lane; i < p.part4; i += LANES) {
        x[base + i] = x[base + i] * scale * weight[i];
    }
}

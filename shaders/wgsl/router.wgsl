// Softmax over the experts, then the top-k of them, one workgroup a token. Ties go to the lower index.
struct Params {
    rows: u32,     // T
    h4: u32,       // H / 4
    experts: u32,  // E
    top_k: u32,    // K
    renormalise: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;          // [T, H/4] normed
@group(0) @binding(2) var<storage, read> w: array<vec4<f32>>;          // [E, H/4]
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;     // [T, K], largest weight first
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;    // [T, K]

const LANES: u32 = 32u;
const MAX_EXPERTS: u32 = 1024u;
const TAKEN: f32 = -3.0e38;
var<workgroup> scores: array<f32, 1024>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    for (var e = lane; e < p.experts; e += LANES) {
        var sum = vec4<f32>(0.0);
        for (var k = 0u; k < p.h4; k++) {
            sum = fma(x[row * p.h4 + k], w[e * p.h4 + k], sum);
        }
        scores[e] = (sum.x + sum.y) + (sum.z + sum.w);
    }
    workgroupBarrier();
    if lane != 0u {
        return;
    }

    var largest = scores[0];
    for (var e = 1u; e < p.experts; e++) {
        largest = max(largest, scores[e]);
    }
    var denominator = 0.0;
    for (var e = 0u; e < p.experts; e++) {
        denominator += exp(scores[e] - largest);
    }
    var selected = 0.0;
    for (var k = 0u; k < p.top_k; k++) {
        var best = 0u;
        for (var e = 1u; e < p.experts; e++) {
            if scores[e] > scores[best] {
                best = e;
            }
        }
        let weight = exp(scores[best] - largest) / denominator;
        selected += weight;
        chosen[row * p.top_k + k] = best;
        weights[row * p.top_k + k] = weight;
        scores[best] = TAKEN;
    }
    if p.renormalise != 0u {
        for (var k = 0u; k < p.top_k; k++) {
            weights[row * p.top_k + k] = weights[row * p.top_k + k] / selected;
        }
    }
}

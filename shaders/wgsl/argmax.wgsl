// chosen[t] = the index of the largest logit of row t, the lower one among equals; one workgroup a row.
struct Params {
    vocab: u32,    // V
    stride: u32,   // of a row of logits
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<vec4<f32>>;  // [T, stride/4]
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>;  // [T]

const LANES: u32 = 32u;
var<workgroup> best_value: array<f32, 32>;
var<workgroup> best_index: array<u32, 32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = group.x * p.stride / 4u;
    var value = -3.4e38;
    var index = 0xffffffffu;
    for (var i = lane; 4u * i < p.vocab; i += LANES) {
        let four = logits[base + i];
        for (var j = 0u; j < 4u; j++) {
            // What stands behind the last of the vocabulary is no token's.
            if four[j] > value && 4u * i + j < p.vocab {
                value = four[j];
                index = 4u * i + j;
            }
        }
    }
    best_value[lane] = value;
    best_index[lane] = index;
    workgroupBarrier();
    if lane == 0u {
        for (var i = 1u; i < LANES; i++) {
            let better = best_value[i] > value || (best_value[i] == value && best_index[i] < index);
            value = select(value, best_value[i], better);
            index = select(index, best_index[i], better);
        }
        chosen[group.x] = min(index, p.vocab - 1u);
    }
}

// chosen[t] = the index of the largest logit of row t, the lower one among equals; one workgroup a row.
struct Params {
    vocab: u32,    // V
    stride: u32,   // of a row of logits
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<vec4<f32>>;  // [T, stride/4]
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>;  // [T]

@if(subgroup) const LANES: u32 = 8u;
@else const LANES: u32 = 32u;

struct Best {
    value: f32,
    index: u32,
}

// Equal values go to the lower index.
fn better_of(a: Best, b: Best) -> Best {
    let second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return Best(select(a.value, b.value, second), select(a.index, b.index, second));
}

@if(subgroup) fn of_lane(mine: Best, lane: u32) -> Best {
    return Best(subgroupShuffle(mine.value, lane), subgroupShuffle(mine.index, lane));
}
@if(!subgroup) var<workgroup> of_lanes: array<Best, LANES>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = group.x * p.stride / 4u;
    let last = (p.vocab - 1u) / 4u;
    var best = Best(-3.4e38, 0xffffffffu);
    // Left at its end (`shared/product.wgsl` says why).
    var i = lane;
    loop {
        let at = min(i, last);
        let four = logits[base + at];
        for (var j = 0u; j < 4u; j++) {
            // What stands behind the last of the vocabulary is no token's.
            let is_better = four[j] > best.value && 4u * at + j < p.vocab;
            best.value = select(best.value, four[j], is_better);
            best.index = select(best.index, 4u * at + j, is_better);
        }
        i += LANES;
        if i > last {
            break;
        }
    }
    @if(subgroup) {
        best = better_of(best, of_lane(best, lane ^ 1u));
        best = better_of(best, of_lane(best, lane ^ 2u));
        best = better_of(best, of_lane(best, lane ^ 4u));
    }
    @else {
        of_lanes[lane] = best;
        workgroupBarrier();
        if lane == 0u {
            for (var i = 1u; i < LANES; i++) {
                best = better_of(best, of_lanes[i]);
            }
        }
    }
    if lane == 0u {
        chosen[group.x] = min(best.index, p.vocab - 1u);
    }
}

// Scores of all experts, the choice of top-k and their weights, one workgroup a token. Equal scores go to the lower
// index; the chosen come largest weight first, equal weights in the order of choice.
struct Params {
    rows: u32,           // T
    h4: u32,             // H / 4
    experts: u32,        // E
    top_k: u32,          // K
    score: u32,          // SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID or SPARSEMIXER
    renormalise: u32,
    has_bias: u32,       // bias is added to the products
    has_correction: u32, // correction is added for the choice alone
    groups: u32,         // equal stretches of experts; 1: none
    groups_kept: u32,    // experts of the other groups are not chosen
    group_best: u32,     // a group's score is the sum of so many of its best
    scale: f32,          // of the weights
    threshold: f32,      // SPARSEMIXER: the relative distance beyond which an expert does not count
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;          // [T, H/4] normed
@group(0) @binding(2) var<storage, read> w: array<vec4<f32>>;          // [E, H/4]
@group(0) @binding(3) var<storage, read> bias: array<f32>;             // [2, E] bias, correction; any buffer without
@group(0) @binding(4) var<storage, read_write> chosen: array<u32>;     // [T, K]
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;    // [T, K]

const LANES: u32 = 32u;
const NEVER: f32 = -3.0e38;
const SOFTMAX: u32 = 0u;
const SOFTMAX_OF_CHOSEN: u32 = 1u;
const SIGMOID: u32 = 2u;
const SPARSEMIXER: u32 = 3u;
var<workgroup> scores: array<f32, 1024>;
var<workgroup> choice: array<f32, 1024>;

fn best_of(first: u32, count: u32) -> u32 {
    var best = first;
    for (var e = first + 1u; e < first + count; e++) {
        if choice[e] > choice[best] {
            best = e;
        }
    }
    return best;
}

// Experts outside the best groups are taken out of the choice.
fn keep_best_groups() {
    let size = p.experts / p.groups;
    var group_scores: array<f32, 64>;
    for (var g = 0u; g < p.groups; g++) {
        let first = best_of(g * size, size);
        var sum = choice[first];
        if p.group_best > 1u && size > 1u {
            choice[first] = NEVER;
            let second = choice[best_of(g * size, size)];
            choice[first] = sum;
            sum += second;
        }
        group_scores[g] = sum;
    }
    for (var kept = 0u; kept < p.groups_kept; kept++) {
        var best = 0u;
        for (var g = 1u; g < p.groups; g++) {
            if group_scores[g] > group_scores[best] {
                best = g;
            }
        }
        group_scores[best] = NEVER;
    }
    for (var g = 0u; g < p.groups; g++) {
        if group_scores[g] > NEVER {
            for (var e = g * size; e < (g + 1u) * size; e++) {
                choice[e] = NEVER;
            }
        }
    }
}

// Softmax over the experts near enough to the best one that is left (Liu et al., GRIN-MoE, 2024): its own share.
fn sparsemixer_weight(best: u32) -> f32 {
    let largest = choice[best];
    var sum = 0.0;
    for (var e = 0u; e < p.experts; e++) {
        let distance = (largest - scores[e]) / max(abs(scores[e]), largest);
        if choice[e] > NEVER && distance <= p.threshold {
            sum += exp(choice[e] - largest);
        }
    }
    return 1.0 / sum;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    for (var e = lane; e < p.experts; e += LANES) {
        var sum = vec4<f32>(0.0);
        for (var k = 0u; k < p.h4; k++) {
            sum = fma(x[row * p.h4 + k], w[e * p.h4 + k], sum);
        }
        var score = (sum.x + sum.y) + (sum.z + sum.w);
        if p.has_bias != 0u {
            score += bias[e];
        }
        if p.score == SIGMOID {
            score = 1.0 / (1.0 + exp(-score));
        }
        scores[e] = score;
        if p.has_correction != 0u {
            score += bias[p.experts + e];
        }
        choice[e] = score;
    }
    workgroupBarrier();
    if lane != 0u {
        return;
    }

    if p.groups > 1u {
        keep_best_groups();
    }
    var largest = scores[0];
    var denominator = 0.0;
    if p.score == SOFTMAX {
        for (var e = 1u; e < p.experts; e++) {
            largest = max(largest, scores[e]);
        }
        for (var e = 0u; e < p.experts; e++) {
            denominator += exp(scores[e] - largest);
        }
    }
    let base = row * p.top_k;
    var selected = 0.0;
    for (var k = 0u; k < p.top_k; k++) {
        let best = best_of(0u, p.experts);
        var weight = scores[best];
        switch p.score {
            case SOFTMAX: {
                weight = exp(weight - largest) / denominator;
            }
            case SOFTMAX_OF_CHOSEN: {
                if k == 0u {
                    largest = weight;
                }
                weight = exp(weight - largest);
            }
            case SPARSEMIXER: {
                weight = sparsemixer_weight(best);
            }
            default: {}
        }
        choice[best] = NEVER;
        selected += weight;
        // Behind every weight that is not smaller.
        var at = k;
        while at > 0u && weights[base + at - 1u] < weight {
            weights[base + at] = weights[base + at - 1u];
            chosen[base + at] = chosen[base + at - 1u];
            at--;
        }
        weights[base + at] = weight;
        chosen[base + at] = best;
    }
    let divisor = select(1.0, selected, p.renormalise != 0u || p.score == SOFTMAX_OF_CHOSEN);
    for (var k = 0u; k < p.top_k; k++) {
        weights[base + k] = weights[base + k] / divisor * p.scale;
    }
}

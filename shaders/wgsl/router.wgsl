// The norm of each token's row, the scores of all experts, the choice of top-k and their weights, one workgroup a token. Equal
// scores go to the lower index; the chosen come largest weight first, equal weights in the order of choice. Where one
// token is all there is, its pairs are sorted and cut into tiles too, as expert_permute.wgsl does it for more.
import package::shared::row::{LANES, spread, x}; // binding 7: x [.., H/4], the residual stream
import package::shared::pair::{Pair, Tile};
import package::shared::texel::texel_of;

struct Params {
    width: u32,          // H; columns beyond it are 0 in x and in the norm's weight
    h4: u32,             // ceil(H / 4)
    centred: u32,        // 1: LayerNorm, 0: RMSNorm
    eps: f32,
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
    lists: u32,          // 1: there is one token, whose pairs are wanted
    up_groups: u32,      // workgroups along the columns of expert_up
    down_groups: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
// The norm's weight and bias [2, H/4], w [E, H/4], the experts' bias and correction [2 * E]; where CPUs read them, in a texture as
// matrices are (`shared/matrix.wgsl`).
@if(image) @group(0) @binding(1) var constants: texture_storage_2d<rgba32uint, read>;
@else @group(0) @binding(1) var<storage, read> constants: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>;     // [T, K]
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;    // [T, K]
@group(0) @binding(4) var<storage, read_write> pairs: array<Pair>;     // [K], any buffer where no lists are wanted
@group(0) @binding(5) var<storage, read_write> tiles: array<Tile>;     // [K], likewise
@group(0) @binding(6) var<storage, read_write> launches: array<u32>;   // [2, 3] expert_up, expert_down, likewise
@group(0) @binding(8) var<storage, read_write> y: array<vec4<f32>>;    // [T, H/4] normed

const NEVER: f32 = -3.0e38;
const SOFTMAX: u32 = 0u;
const SOFTMAX_OF_CHOSEN: u32 = 1u;
const SIGMOID: u32 = 2u;
const SPARSEMIXER: u32 = 3u;
var<workgroup> scores: array<f32, 1024>;
var<workgroup> choice: array<f32, 1024>;

fn constant(i: u32) -> vec4<f32> {
    @if(image) return bitcast<vec4<f32>>(textureLoad(constants, texel_of(i)));
    @else return constants[i];
}

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

// The bias (0) or the correction (1) of an expert.
fn of_expert(which: u32, e: u32) -> f32 {
    let at = which * p.experts + e;
    return constant((2u + p.experts) * p.h4 + at / 4u)[at % 4u];
}

fn note(e: u32, product: vec4<f32>) {
    var score = (product.x + product.y) + (product.z + product.w);
    if p.has_bias != 0u {
        score += of_expert(0u, e);
    }
    if p.score == SIGMOID {
        score = 1.0 / (1.0 + exp(-score));
    }
    scores[e] = score;
    if p.has_correction != 0u {
        score += of_expert(1u, e);
    }
    choice[e] = score;
}

// The pairs of the one token, by expert, each a tile.
fn list_pairs() {
    for (var k = 0u; k < p.top_k; k++) {
        let e = chosen[k];
        var at = 0u;
        for (var other = 0u; other < p.top_k; other++) {
            at += select(0u, 1u, chosen[other] < e);
        }
        pairs[at] = Pair(0u, k, weights[k], e);
        tiles[at] = Tile(e, at, 1u, 0u);
    }
    launches[0] = p.top_k;
    launches[1] = p.up_groups;
    launches[2] = 1u;
    launches[3] = p.top_k;
    launches[4] = p.down_groups;
    launches[5] = 1u;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    let x_base = row * p.h4;
    let s = spread(x_base, p.width, p.h4, p.centred != 0u, p.eps, lane);
    for (var i = lane; i < p.h4; i += LANES) {
        var value = (x[x_base + i] - vec4<f32>(s.mean)) * s.scale * constant(i);
        if p.centred != 0u {
            value += constant(p.h4 + i);
        }
        y[x_base + i] = value;
    }
    @if(subgroup) {
        // A lane reads of the normed row what it wrote, and hands it to the others.
        // Loops are left at their ends (`shared/product.wgsl` says why).
        let h4 = p.h4;
        var first = 0u;
        loop {
            let e = min(first + lane, p.experts - 1u);
            let w_base = (2u + e) * h4;
            var sum = vec4<f32>(0.0);
            var k = 0u;
            loop {
                let begin = k;
                let end = min(k + LANES, h4);
                let mine = y[x_base + min(k + lane, h4 - 1u)];
                loop {
                    sum = fma(subgroupShuffle(mine, k - begin), constant(w_base + k), sum);
                    k++;
                    if k >= end {
                        break;
                    }
                }
                if k >= h4 {
                    break;
                }
            }
            note(e, sum);
            first += LANES;
            if first >= p.experts {
                break;
            }
        }
    }
    @else {
        storageBarrier();
        for (var e = lane; e < p.experts; e += LANES) {
            var sum = vec4<f32>(0.0);
            for (var k = 0u; k < p.h4; k++) {
                sum = fma(y[x_base + k], constant((2u + e) * p.h4 + k), sum);
            }
            note(e, sum);
        }
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
    if p.lists != 0u {
        list_pairs();
    }
}

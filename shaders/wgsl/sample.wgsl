// Draws a token for each row that wants one, among the likeliest tokens that top-k, top-p and min-p leave; one workgroup
// a row. Likelihoods are integers, so that no sum is rounded and their order is no matter: the twin has the same token.
struct Params {
    vocab: u32,    // V
    stride: u32,   // of a row of logits
}
struct Draw {
    scale: f32,    // log2(e) / temperature; 0: the row's token is there already
    top_k: u32,    // so many of the likeliest; 0: all
    top_p: u32,    // 2^24ths of the likelihood that the likeliest have together; 2^24: all
    min_p: u32,    // 2^30ths of the likeliest one's likelihood
    unit: u32,     // a random number, 2^32nds of 1
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;        // [T, stride]
@group(0) @binding(2) var<storage, read> draws: array<Draw>;        // [T]
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;  // [T]

const LANES: u32 = 256u;
const BINS: u32 = 256u;
const LIMBS: u32 = 3u;
const LIMB_BITS: u32 = 10u;

// What is left: tokens of greater keys than `cut`, and the first `equals` of those whose key it is.
var<workgroup> cut: u32;
var<workgroup> equals: u32;
var<workgroup> largest: atomic<u32>;
// Sums of 64 bits are (low, high).
var<workgroup> goal: vec2<u32>;
var<workgroup> reached: vec2<u32>;
var<workgroup> total: vec2<u32>;
var<workgroup> bins: array<atomic<u32>, 768>;
var<workgroup> lane_sums: array<vec2<u32>, 256>;
var<workgroup> lane_equals: array<u32, 256>;
var<workgroup> drawing_lane: u32;

fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + u32(low < a.x));
}

fn subtract(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// The high word of a product.
fn high(a: u32, b: u32) -> u32 {
    let middle = (a >> 16u) * (b & 0xffffu) + (((a & 0xffffu) * (b & 0xffffu)) >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}

fn product(a: u32, b: u32) -> vec2<u32> {
    return vec2(a * b, high(a, b));
}

// Numbers in the order of logits.
fn key_of(logit: f32) -> u32 {
    let bits = bitcast<u32>(logit);
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

fn logit_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u));
}

// 2^30 * 2^-(below * scale), `below` being how far a logit is below the largest one.
fn likelihood(below: f32, scale: f32) -> u32 {
    let bits = bitcast<u32>(below * scale);
    let exponent = bits >> 23u;
    // From 32 on there is nothing left; below 2^-24 nothing is lost.
    if exponent >= 132u || exponent < 103u {
        return select(0u, 1u << 30u, exponent < 103u);
    }
    let mantissa = (bits & 0x7fffffu) | 0x800000u;
    // The product in 2^-24ths.
    let fixed = select(mantissa >> ((126u - exponent) & 31u), mantissa << ((exponent - 126u) & 31u), exponent >= 126u);
    let f = fixed << 8u;
    // 2^-f = 1 - f (ln 2 - f (ln^2 2 / 2! - ...)), in 2^-32nds.
    var s = 5676u;
    s = 65510u - high(f, s);
    s = 661577u - high(f, s);
    s = 5726720u - high(f, s);
    s = 41309550u - high(f, s);
    s = 238388332u - high(f, s);
    s = 1031764991u - high(f, s);
    s = 2977044472u - high(f, s);
    return ((1u << 30u) - (high(f, s) >> 2u)) >> (fixed >> 24u);
}

fn at(key: u32, scale: f32) -> u32 {
    return likelihood(logit_of(atomicLoad(&largest)) - logit_of(key), scale);
}

fn in_bin(bin: u32) -> vec2<u32> {
    var sum = vec2(atomicLoad(&bins[LIMBS * bin]), 0u);
    for (var limb = 1u; limb < LIMBS; limb++) {
        sum = add(sum, product(atomicLoad(&bins[LIMBS * bin + limb]), 1u << (LIMB_BITS * limb)));
    }
    return sum;
}

// Cuts behind the token with which the likeliest ones reach `goal`, by their number or by their likelihood: byte by byte
// of its key, the highest first.
fn narrow(base: u32, lane: u32, scale: f32, on: bool, by_likelihood: bool) {
    if on && lane == 0u {
        cut = 0u;
        reached = vec2(0u);
    }
    for (var shift = 24i; shift >= 0i; shift -= 8i) {
        for (var limb = 0u; limb < LIMBS; limb++) {
            atomicStore(&bins[LIMBS * lane + limb], 0u);
        }
        workgroupBarrier();
        if on {
            let low = u32(shift);
            for (var v = lane; v < p.vocab; v += LANES) {
                let key = key_of(logits[base + v]);
                if shift == 24i || ((key ^ cut) >> ((low + 8u) & 31u)) == 0u {
                    let bin = LIMBS * ((key >> low) & 255u);
                    var rest = 1u;
                    if by_likelihood {
                        rest = at(key, scale);
                    }
                    for (var limb = 0u; limb < LIMBS; limb++) {
                        let part = select(rest & 1023u, rest, limb == LIMBS - 1u);
                        if part > 0u {
                            atomicAdd(&bins[bin + limb], part);
                        }
                        rest >>= LIMB_BITS;
                    }
                }
            }
        }
        workgroupBarrier();
        if on && lane == 0u {
            var bin = BINS - 1u;
            for (; bin > 0u; bin--) {
                let more = add(reached, in_bin(bin));
                if !less(more, goal) {
                    break;
                }
                reached = more;
            }
            cut |= bin << u32(shift);
        }
        workgroupBarrier();
    }
    if on && lane == 0u {
        let each = select(1u, at(cut, scale), by_likelihood);
        equals = 0u;
        while less(reached, goal) && equals < p.vocab {
            reached = add(reached, vec2(each, 0u));
            equals++;
        }
    }
    workgroupBarrier();
}

// Likelihoods of what is left and at least `least`, of the tokens of each lane and of all; each lane has ids that follow
// each other.
fn sum(base: u32, lane: u32, scale: f32, on: bool, least: u32) {
    let chunk = (p.vocab + LANES - 1u) / LANES;
    var here = vec2(0u);
    var equal = 0u;
    if on {
        for (var v = lane * chunk; v < min(lane * chunk + chunk, p.vocab); v++) {
            let key = key_of(logits[base + v]);
            if key > cut {
                let one = at(key, scale);
                here = add(here, vec2(select(0u, one, one >= least), 0u));
            }
            equal += u32(key == cut);
        }
    }
    lane_sums[lane] = here;
    lane_equals[lane] = equal;
    workgroupBarrier();
    if on && lane == 0u {
        let one = at(cut, scale);
        var left = equals;
        var all = vec2(0u);
        for (var i = 0u; i < LANES; i++) {
            let taken = min(lane_equals[i], left);
            left -= taken;
            lane_equals[i] = taken;
            lane_sums[i] = add(lane_sums[i], product(taken, select(0u, one, one >= least)));
            all = add(all, lane_sums[i]);
        }
        total = all;
    }
    workgroupBarrier();
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let draw = draws[group.x];
    let base = group.x * p.stride;
    let on = draw.scale > 0.0;
    if lane == 0u {
        atomicStore(&largest, 0u);
        cut = 0u;
        equals = p.vocab;
        goal = vec2(draw.top_k, 0u);
    }
    workgroupBarrier();
    if on {
        var most = 0u;
        for (var v = lane; v < p.vocab; v += LANES) {
            most = max(most, key_of(logits[base + v]));
        }
        atomicMax(&largest, most);
    }
    workgroupBarrier();
    narrow(base, lane, draw.scale, on && draw.top_k > 0u && draw.top_k < p.vocab, false);

    let nucleus = on && draw.top_p < (1u << 24u);
    sum(base, lane, draw.scale, nucleus, 0u);
    if nucleus && lane == 0u {
        // (total / 2^8) * top_p / 2^16
        let low = product((total.x >> 8u) | (total.y << 24u), draw.top_p);
        let both = low.y + (total.y >> 8u) * draw.top_p;
        goal = vec2((low.x >> 16u) | (both << 16u), both >> 16u);
    }
    workgroupBarrier();
    narrow(base, lane, draw.scale, nucleus, true);

    sum(base, lane, draw.scale, on, draw.min_p);
    if on && lane == 0u {
        // total * unit / 2^32
        goal = add(product(total.y, draw.unit), vec2(high(total.x, draw.unit), 0u));
        drawing_lane = 0u;
        while !less(goal, lane_sums[drawing_lane]) && drawing_lane < LANES - 1u {
            goal = subtract(goal, lane_sums[drawing_lane]);
            drawing_lane++;
        }
    }
    workgroupBarrier();
    if on && lane == drawing_lane {
        let chunk = (p.vocab + LANES - 1u) / LANES;
        var rest = goal;
        var left = lane_equals[lane];
        var token = 0u;
        for (var v = lane * chunk; v < min(lane * chunk + chunk, p.vocab); v++) {
            let key = key_of(logits[base + v]);
            let equal = key == cut && left > 0u;
            left -= u32(equal);
            if key > cut || equal {
                let one = at(key, draw.scale);
                if one >= draw.min_p && one > 0u {
                    token = v;
                    if less(rest, vec2(one, 0u)) {
                        break;
                    }
                    rest = subtract(rest, vec2(one, 0u));
                }
            }
        }
        chosen[group.x] = token;
    }
}

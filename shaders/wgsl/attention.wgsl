// Causal attention of each token over its own context, one workgroup per (token, head), keys and values from
// the paged cache. Online softmax (Milakov and Gimelshein 2018) over tiles of LANES positions that start at
// absolute multiples of LANES: the same bits for any batch and any prefill chunking.
struct Params {
    heads: u32,
    d4: u32,            // D / 4, the padded head size
    q_stride4: u32,     // of a row of q
    table_stride: u32,  // blocks per row of the block table
    scale: f32,         // 1 / sqrt(D)
}
struct Query {
    position: u32,   // this token sees positions 0 ..= position
    table_row: u32,  // row of the block table that holds its context
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [T, q_stride/4], head h at h * D/4
@group(0) @binding(2) var<storage, read> cache: array<vec4<f32>>;     // [slots, 2, heads * D/4]
@group(0) @binding(3) var<storage, read> queries: array<Query>;       // [T]
@group(0) @binding(4) var<storage, read> block_table: array<u32>;     // [rows, table_stride] block numbers
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>; // [T, heads * D/4]

const LANES: u32 = 32u;
const BLOCK: u32 = 16u;  // positions per cache block
const MAX_D4: u32 = 64u; // head size up to 256: two vec4 columns a lane
var<workgroup> scores: array<f32, 32>;
var<workgroup> slots: array<u32, 32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let token = group.y;
    let head = group.x;
    let query = queries[token];
    let kv4 = p.heads * p.d4;
    let q_base = token * p.q_stride4 + head * p.d4;
    var acc: array<vec4<f32>, 2>;
    var running_max = -3.0e38;
    var denominator = 0.0;

    for (var tile = 0u; tile <= query.position; tile += LANES) {
        let count = min(LANES, query.position - tile + 1u);
        var score = -3.0e38;
        if lane < count {
            let position = tile + lane;
            let slot = block_table[query.table_row * p.table_stride + position / BLOCK] * BLOCK + position % BLOCK;
            slots[lane] = slot;
            let k_base = slot * 2u * kv4 + head * p.d4;
            var sum = vec4<f32>(0.0);
            for (var d = 0u; d < p.d4; d++) {
                sum = fma(q[q_base + d], cache[k_base + d], sum);
            }
            score = ((sum.x + sum.y) + (sum.z + sum.w)) * p.scale;
        }
        scores[lane] = score;
        workgroupBarrier();

        var tile_max = running_max;
        for (var i = 0u; i < count; i++) {
            tile_max = max(tile_max, scores[i]);
        }
        let correction = exp(running_max - tile_max);
        running_max = tile_max;
        denominator *= correction;
        acc[0] *= correction;
        acc[1] *= correction;
        for (var i = 0u; i < count; i++) {
            let weight = exp(scores[i] - tile_max);
            denominator += weight;
            let v_base = (slots[i] * 2u + 1u) * kv4 + head * p.d4;
            if lane < p.d4 {
                acc[0] = fma(vec4<f32>(weight), cache[v_base + lane], acc[0]);
            }
            if lane + LANES < p.d4 {
                acc[1] = fma(vec4<f32>(weight), cache[v_base + lane + LANES], acc[1]);
            }
        }
        workgroupBarrier();
    }

    let out_base = token * kv4 + head * p.d4;
    if lane < p.d4 {
        out[out_base + lane] = acc[0] / denominator;
    }
    if lane + LANES < p.d4 {
        out[out_base + lane + LANES] = acc[1] / denominator;
    }
}

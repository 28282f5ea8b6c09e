// Causal attention of each token over its own context, one workgroup per (token, head), keys and values from
// the paged cache. Online softmax (Milakov and Gimelshein 2018) over tiles of LANES positions that start at
// absolute multiples of LANES: the same bits for any batch and any prefill chunking.
//
// Query heads share key heads in groups. Values may be a part of the keys (a latent), a context may be cut to a
// window, and a head may have a sink: a score that takes weight and gives no value.
struct Params {
    group: u32,         // query heads per key head
    d4: u32,            // of a query and a key, in vec4s
    v4: u32,            // of a value
    q_stride4: u32,     // of a row of q
    cache_stride4: u32, // of a row of the cache
    v_offset4: u32,     // of the values in a row of the cache
    v_head4: u32,       // from a key head's values to the next's
    table_stride: u32,  // blocks per row of the block table
    window: u32,        // positions that a token sees, its own included
    has_sinks: u32,
    scale: f32,
}
struct Query {
    position: u32,   // this token sees positions 0 ..= position
    table_row: u32,  // row of the block table that holds its context
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [T, q_stride/4], head h at h * d4
@group(0) @binding(2) var<storage, read> cache: array<vec4<f32>>;     // [slots, cache_stride/4], key head at h * d4
@group(0) @binding(3) var<storage, read> queries: array<Query>;       // [T]
@group(0) @binding(4) var<storage, read> block_table: array<u32>;     // [rows, table_stride] block numbers
@group(0) @binding(5) var<storage, read> sinks: array<f32>;           // [heads], any buffer without
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>; // [T, heads * v4]

const LANES: u32 = 32u;
const BLOCK: u32 = 16u;  // positions per cache block
@if(wide) const COLUMNS: u32 = 4u; // values of up to 512
@else const COLUMNS: u32 = 2u;     // values of up to 256: two vec4s a lane
var<workgroup> scores: array<f32, 32>;
var<workgroup> slots: array<u32, 32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let token = group.y;
    let head = group.x;
    let query = queries[token];
    let first = query.position + 1u - min(query.position + 1u, p.window);
    let key_head = head / p.group;
    let q_base = token * p.q_stride4 + head * p.d4;
    var acc: array<vec4<f32>, COLUMNS>;
    var running_max = -3.0e38;
    var denominator = 0.0;
    if p.has_sinks != 0u {
        running_max = sinks[head];
        denominator = 1.0;
    }

    for (var tile = first / LANES * LANES; tile <= query.position; tile += LANES) {
        let from_lane = max(first, tile) - tile;
        let to_lane = min(LANES, query.position - tile + 1u);
        if lane >= from_lane && lane < to_lane {
            let position = tile + lane;
            let slot = block_table[query.table_row * p.table_stride + position / BLOCK] * BLOCK + position % BLOCK;
            slots[lane] = slot;
            let k_base = slot * p.cache_stride4 + key_head * p.d4;
            var sum = vec4<f32>(0.0);
            for (var d = 0u; d < p.d4; d++) {
                sum = fma(q[q_base + d], cache[k_base + d], sum);
            }
            scores[lane] = ((sum.x + sum.y) + (sum.z + sum.w)) * p.scale;
        }
        workgroupBarrier();

        var tile_max = running_max;
        for (var i = from_lane; i < to_lane; i++) {
            tile_max = max(tile_max, scores[i]);
        }
        let correction = exp(running_max - tile_max);
        running_max = tile_max;
        denominator *= correction;
        for (var c = 0u; c < COLUMNS; c++) {
            acc[c] *= correction;
        }
        for (var i = from_lane; i < to_lane; i++) {
            let weight = exp(scores[i] - tile_max);
            denominator += weight;
            let v_base = slots[i] * p.cache_stride4 + p.v_offset4 + key_head * p.v_head4;
            for (var c = 0u; c < COLUMNS; c++) {
                let column = c * LANES + lane;
                if column < p.v4 {
                    acc[c] = fma(vec4<f32>(weight), cache[v_base + column], acc[c]);
                }
            }
        }
        workgroupBarrier();
    }

    let out_base = (token * groups.x + head) * p.v4;
    for (var c = 0u; c < COLUMNS; c++) {
        let column = c * LANES + lane;
        if column < p.v4 {
            out[out_base + column] = acc[c] / denominator;
        }
    }
}

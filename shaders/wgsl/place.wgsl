// Behind the product that makes queries, keys and values: RMSNorm of queries and keys, a clamp of all three, rotary positions of
// queries and keys, and keys and values into the paged cache, rounded to its type. One workgroup a (row, part): a part is
// a head, or all heads of a kind where they are normed as one; parts of queries come first, then those of keys, then
// those of values. With no heads of queries and keys a part is a whole row of the cache, which is only written.
import package::shared::cached::{Cached, cached_column, cached_row, narrowed, step_of, steps};
import package::shared::texel::texel_of;
import package::shared::row::{LANES, PER_LANE, STRETCHES, Stretches, total};

struct Params {
    stride4: u32,  // of a row of x
    offset4: u32,  // of the first part within it
    d4: u32,       // of a head
    q_heads: u32,
    k_heads: u32,
    q_span: u32,   // heads in a part of queries
    k_span: u32,   // heads in a part of keys or values
    cache4: u32,   // of a row of the cache: keys, then values
    appends: u32,  // 0: the cache is left alone
    normed4: u32,  // vec4s of a head that are normed, its first; 0: none
    normed: u32,   // columns of them without padding, which is 0 in x and in the weight
    norms_queries: u32, // 0: only keys are normed
    clips: u32,
    limit: f32,    // of the clamp, on both sides
    first: u32,    // first column of a head that turns
    half: u32,     // pairs (first + i, first + half + i) that turn; 0: none
    part4: u32,    // of a row of the cache (`cached_row`)
    eps: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q_weight: array<vec4<f32>>; // [q_span * normed4], any buffer without
@group(0) @binding(2) var<storage, read> k_weight: array<vec4<f32>>; // [k_span * normed4], likewise
@group(0) @binding(3) var<storage, read> turns: array<vec2<f32>>;    // [T, half] cosine, sine
@group(0) @binding(4) var<storage, read> slots: array<u32>;          // [T] position within the cache
@group(0) @binding(5) var<storage, read_write> x: array<vec4<f32>>;  // [T, stride4]
// [slots] of rows (`cached_row`)
@if(image && kv16) @group(0) @binding(6) var cache: texture_storage_2d<rg32uint, write>;
@elif(image && kv8) @group(0) @binding(6) var cache: texture_storage_2d<r32uint, write>;
@elif(image) @group(0) @binding(6) var cache: texture_storage_2d<rgba32uint, write>;
@else @group(0) @binding(6) var<storage, read_write> cache: array<Cached>;

fn put(i: u32, value: Cached) {
    @if(image && kv16) textureStore(cache, texel_of(i), vec4<u32>(value, 0u, 0u));
    @elif(image && kv8) textureStore(cache, texel_of(i), vec4<u32>(value));
    @elif(image) textureStore(cache, texel_of(i), bitcast<vec4<u32>>(value));
    @else cache[i] = value;
}

// Sums in the order of `shared/row.wgsl`.
fn norm(base: u32, heads: u32, is_query: bool, lane: u32) {
    let width4 = heads * p.normed4;
    var squares: Stretches;
    for (var j = 0u; j < PER_LANE; j++) {
        for (var i = j * LANES + lane; i < width4; i += STRETCHES) {
            let v = x[base + i / p.normed4 * p.d4 + i % p.normed4];
            squares[j] += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        }
    }
    let scale = 1.0 / sqrt(total(lane, squares) / f32(heads * p.normed) + p.eps);
    for (var i = lane; i < width4; i += LANES) {
        let at = base + i / p.normed4 * p.d4 + i % p.normed4;
        var weight = k_weight[select(i, 0u, is_query)];
        if is_query {
            weight = q_weight[i];
        }
        x[at] = x[at] * scale * weight;
    }
}

fn turn(base: u32, heads: u32, row: u32, lane: u32) {
    for (var i = lane; i < heads * p.half; i += LANES) {
        let pair = i % p.half;
        let low = 4u * (base + i / p.half * p.d4) + p.first + pair;
        let high = low + p.half;
        let angle = turns[row * p.half + pair];
        let a = x[low / 4u][low % 4u];
        let b = x[high / 4u][high % 4u];
        x[low / 4u][low % 4u] = a * angle.x - b * angle.y;
        x[high / 4u][high % 4u] = b * angle.x + a * angle.y;
    }
}

// vec4s `base ..` of x to those from `column` on of a row of the cache.
fn append(base: u32, count4: u32, row: u32, column: u32, lane: u32) {
    let to = cached_row(slots[row], p.cache4, p.part4);
    // With scales, a row is one part.
    @if(kv8) {
        for (var block = lane; 8u * block < count4; block += LANES) {
            let end = min(8u * block + 8u, count4);
            var largest = 0.0;
            for (var c = 8u * block; c < end; c++) {
                let size = abs(x[base + c]);
                largest = max(largest, max(max(size.x, size.y), max(size.z, size.w)));
            }
            let step = step_of(largest);
            for (var c = 8u * block; c < end; c++) {
                put(to + column + c, steps(x[base + c], step));
            }
            put(to + p.cache4 + column / 8u + block, bitcast<u32>(step));
        }
    }
    @else {
        for (var c = lane; c < count4; c += LANES) {
            put(to + cached_column(column + c, p.part4), narrowed(x[base + c]));
        }
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let q_parts = p.q_heads / p.q_span;
    let is_query = group.x < q_parts;
    let heads = select(p.k_span, p.q_span, is_query);
    let head = select(p.q_heads + (group.x - q_parts) * p.k_span, group.x * p.q_span, is_query);
    let is_value = head >= p.q_heads + p.k_heads;
    let base = row * p.stride4 + p.offset4 + head * p.d4;
    if p.normed4 > 0u && !is_value && (!is_query || p.norms_queries != 0u) {
        norm(base, heads, is_query, lane);
        storageBarrier();
    }
    if p.clips != 0u {
        for (var i = lane; i < heads * p.d4; i += LANES) {
            x[base + i] = clamp(x[base + i], vec4<f32>(-p.limit), vec4<f32>(p.limit));
        }
        storageBarrier();
    }
    if p.half > 0u && !is_value {
        turn(base, heads, row, lane);
        storageBarrier();
    }
    if p.appends != 0u && !is_query {
        append(base, heads * p.d4, row, (head - p.q_heads) * p.d4, lane);
    }
}

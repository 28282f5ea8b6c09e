// Causal attention of each token over its own context, one workgroup per (token, head), keys and values from
// the paged cache. Online softmax (Milakov and Gimelshein 2018) over tiles of LANES positions that start at
// absolute multiples of LANES, within splits at absolute multiples of SPLIT, which are merged in order: the same bits for any
// batch and any prefill chunking, and where each split has a workgroup of its own (`split`) and `attention_merge.wgsl` merges.
//
// Query heads share key heads in groups. Values may be a part of the keys (a latent), a context may be cut to a
// window, and a head may have a sink: a score that takes weight and gives no value.
import package::shared::cached::{Cached, cached_column, cached_row};
import package::shared::texel::texel_of;
import package::shared::split::{SPLIT, add_denominator, add_values, shares};

struct Params {
    group: u32,         // query heads per key head
    d4: u32,            // of a query and a key, in vec4s
    v4: u32,            // of a value
    q_stride4: u32,     // of a row of q
    cache_stride4: u32, // of a row of the cache, in vec4s of values
    v_offset4: u32,     // of the values in a row of the cache
    v_head4: u32,       // from a key head's values to the next's
    table_stride: u32,  // blocks per row of the block table
    window: u32,        // positions that a token sees, its own included
    has_sinks: u32,
    part4: u32,         // of a row of the cache (`cached_row`): a head's keys or values, or all
    scale: f32,
}
struct Query {
    position: u32,   // this token sees positions 0 ..= position
    table_row: u32,  // row of the block table that holds its context
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [T, q_stride/4], head h at h * d4
// [slots] of rows (`cached_row`), key head at column h * d4
@if(image && kv16) @group(0) @binding(2) var cache: texture_storage_2d<rg32uint, read>;
@elif(image && kv8) @group(0) @binding(2) var cache: texture_storage_2d<r32uint, read>;
@elif(image) @group(0) @binding(2) var cache: texture_storage_2d<rgba32uint, read>;
@else @group(0) @binding(2) var<storage, read> cache: array<Cached>;
@group(0) @binding(3) var<storage, read> queries: array<Query>;       // [T]
@group(0) @binding(4) var<storage, read> block_table: array<u32>;     // [rows, table_stride] block numbers
@group(0) @binding(5) var<storage, read> sinks: array<f32>;           // [heads], any buffer without
// [T, heads * v4], or of splits [T, heads, splits, 1 + v4]: largest score and denominator, then weighted values
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;

const LANES: u32 = 32u;  // positions of a tile
const BLOCK: u32 = 16u;  // positions per cache block

@if(subgroup && slim) const COLUMNS: u32 = 1u;        // vec4s of values that a lane makes: of up to 32 columns,
@elif(subgroup && narrow) const COLUMNS: u32 = 2u;    // 64,
@elif(subgroup && usual) const COLUMNS: u32 = 4u;     // 128,
@elif(subgroup && wide) const COLUMNS: u32 = 16u;     // 512,
@elif(subgroup) const COLUMNS: u32 = 8u;              // or 256 by eight lanes,
@elif(slim || narrow || usual) const COLUMNS: u32 = 1u;  // 128,
@elif(wide) const COLUMNS: u32 = 4u;                  // 512
@else const COLUMNS: u32 = 2u;                        // or 256 by 32 lanes

fn element(i: u32) -> Cached {
    @if(image && kv16) return textureLoad(cache, texel_of(i)).xy;
    @elif(image && kv8) return textureLoad(cache, texel_of(i)).x;
    @elif(image) return bitcast<vec4<f32>>(textureLoad(cache, texel_of(i)));
    @else return cache[i];
}

// Four values of the row of the cache that begins at element `row`.
fn cached(row: u32, column: u32) -> vec4<f32> {
    @if(kv16) {
        let two = element(row + column);
        return vec4<f32>(unpack2x16float(two.x), unpack2x16float(two.y));
    }
    @elif(kv8) {
        let scale = bitcast<f32>(element(row + p.cache_stride4 + column / 8u));
        return vec4<f32>(unpack4xI8(element(row + column))) * scale;
    }
    @else {
        return element(row + column);
    }
}

// The block of the cache that holds the positions `number * BLOCK` and on.
fn block_of(query: Query, number: u32) -> u32 {
    return block_table[query.table_row * p.table_stride + number];
}

// Sums over positions, relative to the largest of their scores.
struct Sums {
    largest: f32,
    denominator: f32,
    values: array<vec4<f32>, COLUMNS>,
}

fn nothing() -> Sums {
    var sums: Sums;
    sums.largest = -3.0e38;
    return sums;
}

// What stands before the first split.
fn beginning(head: u32) -> Sums {
    var sums = nothing();
    if p.has_sinks != 0u {
        sums.largest = sinks[head];
        sums.denominator = 1.0;
    }
    return sums;
}

fn merge(all: ptr<function, Sums>, next: ptr<function, Sums>) {
    let s = shares((*all).largest, (*next).largest);
    (*all).largest = s.largest;
    (*all).denominator = add_denominator(s, (*all).denominator, (*next).denominator);
    for (var c = 0u; c < COLUMNS; c++) {
        (*all).values[c] = add_values(s, (*all).values[c], (*next).values[c]);
    }
}

// Positions `from .. to` of a context, of which a workgroup takes all or one split.
struct Span {
    from_position: u32,
    to_position: u32,
}

fn span(first: u32, position: u32, split: u32) -> Span {
    @if(split) {
        let start = (first / SPLIT + split) * SPLIT;
        return Span(max(first, start), min(position + 1u, start + SPLIT));
    }
    @else {
        return Span(first, position + 1u);
    }
}

fn write(row: u32, split: u32, splits: u32, all: ptr<function, Sums>, lanes: u32, lane: u32) {
    @if(split) let base = (row * splits + split) * (1u + p.v4) + 1u;
    @else let base = row * p.v4;
    @if(split) {
        if lane == 0u {
            out[base - 1u] = vec4<f32>((*all).largest, (*all).denominator, 0.0, 0.0);
        }
    }
    for (var c = 0u; c < COLUMNS; c++) {
        let column = c * lanes + lane;
        if column < p.v4 {
            @if(split) out[base + column] = (*all).values[c];
            @else out[base + column] = (*all).values[c] / (*all).denominator;
        }
    }
}

// Products of a head's query with the keys of each lane's four positions. Lanes have a vec4 of the query each, `mine` of the
// first eight, and each serves four loads that do not wait for each other.
@if(subgroup) fn four_products(mine: vec4<f32>, q_base: u32, k_base: u32, rows: vec4<u32>, d4: u32, lane: u32) -> vec4<f32> {
    var a = vec4<f32>(0.0);
    var b = vec4<f32>(0.0);
    var c = vec4<f32>(0.0);
    var d = vec4<f32>(0.0);
    var held = mine;
    // Loops are left at their ends (`shared/product.wgsl` says why).
    var first = 0u;
    loop {
        var e = first;
        loop {
            let value = subgroupShuffle(held, e - first);
            let column = k_base + e;
            a = fma(value, cached(rows.x, column), a);
            b = fma(value, cached(rows.y, column), b);
            c = fma(value, cached(rows.z, column), c);
            d = fma(value, cached(rows.w, column), d);
            e++;
            if e >= min(first + 8u, d4) {
                break;
            }
        }
        first += 8u;
        if first >= d4 {
            break;
        }
        held = q[q_base + min(first + lane, d4 - 1u)];
    }
    return vec4<f32>(
        (a.x + a.y) + (a.z + a.w), (b.x + b.y) + (b.z + b.w), (c.x + c.y) + (c.z + c.w), (d.x + d.y) + (d.z + d.w)
    );
}

// The largest of eight lanes' values, in three steps.
@if(subgroup) fn largest_of(value: f32, lane: u32) -> f32 {
    let of_two = max(value, subgroupShuffle(value, lane ^ 1u));
    let of_four = max(of_two, subgroupShuffle(of_two, lane ^ 2u));
    return max(of_four, subgroupShuffle(of_four, lane ^ 4u));
}

// The same sums as below with eight lanes that hand each other queries, weights and rows: a lane has four positions
// of a tile, eight apart. Those beyond the context count nothing, in place of values at its end.
@if(subgroup) @compute @workgroup_size(8)
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
    let k_base = cached_column(key_head * p.d4, p.part4);
    let q_base = token * p.q_stride4 + head * p.d4;
    let v_base = cached_column(p.v_offset4 + key_head * p.v_head4, p.part4);
    let seen_here = span(first, query.position, group.z);
    var sums = nothing();
    @if(!split) var all = beginning(head);
    // What a parameter is costs a CPU a load for each lane: once, not in each tile.
    let d4 = p.d4;
    let part4 = p.part4;
    let scale = p.scale;
    let apart = cached_row(BLOCK, p.cache_stride4, part4);
    let mine = q[q_base + min(lane, d4 - 1u)];
    var columns: array<u32, COLUMNS>;
    for (var c = 0u; c < COLUMNS; c++) {
        columns[c] = v_base + min(c * 8u + lane, p.v4 - 1u);
    }

    var tile = seen_here.from_position / LANES * LANES;
    loop {
        @if(split) {
            // There may be nothing of this context in the split.
            if tile >= seen_here.to_position {
                break;
            }
        }
        @if(!split) {
            if tile % SPLIT == 0u && tile > first {
                merge(&all, &sums);
                sums = nothing();
            }
        }
        let at = vec4<u32>(tile + lane) + vec4<u32>(0u, 8u, 16u, 24u);
        let from_position = vec4<u32>(max(first, tile));
        let here = clamp(at, from_position, vec4<u32>(query.position));
        let seen = at == here;
        // A tile is two blocks.
        let one = block_of(query, from_position.x / BLOCK);
        let other = block_of(query, min(tile / BLOCK + 1u, query.position / BLOCK));
        let blocks = select(vec4<u32>(one), vec4<u32>(other), here >= vec4<u32>(tile + BLOCK));
        var rows = blocks * apart + here % BLOCK * part4;
        let products = four_products(mine, q_base, k_base, rows, d4, lane) * scale;
        let scores = select(vec4<f32>(sums.largest), products, seen);
        let largest = max(max(scores.x, scores.y), max(scores.z, scores.w));
        let tile_max = max(sums.largest, largest_of(largest, lane));
        let correction = exp(sums.largest - tile_max);
        sums.largest = tile_max;
        sums.denominator *= correction;
        for (var c = 0u; c < COLUMNS; c++) {
            sums.values[c] *= correction;
        }
        var weights = select(vec4<f32>(0.0), exp(scores - vec4<f32>(tile_max)), seen);
        var eights = tile;
        loop {
            for (var i = 0u; i < 8u; i++) {
                let weight = subgroupShuffle(weights.x, i);
                sums.denominator += weight;
                let row = subgroupShuffle(rows.x, i);
                for (var c = 0u; c < COLUMNS; c++) {
                    let value = cached(row, columns[c]);
                    sums.values[c] = fma(vec4<f32>(weight), value, sums.values[c]);
                }
            }
            weights = weights.yzwx;
            rows = rows.yzwx;
            eights += 8u;
            if eights > query.position || eights >= tile + LANES {
                break;
            }
        }
        tile += LANES;
        @if(!split) {
            if tile >= seen_here.to_position {
                break;
            }
        }
    }

    let row = token * groups.x + head;
    @if(split) {
        // A context with fewer splits than the longest one has nothing for the last of them.
        if seen_here.from_position < seen_here.to_position {
            write(row, group.z, groups.z, &sums, 8u, lane);
        }
    }
    @else {
        merge(&all, &sums);
        write(row, 0u, 1u, &all, 8u, lane);
    }
}

@if(!subgroup) var<workgroup> scores: array<f32, 32>;
@if(!subgroup) var<workgroup> rows: array<u32, 32>;

@if(!subgroup) @compute @workgroup_size(LANES)
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
    let seen_here = span(first, query.position, group.z);
    var sums = nothing();
    @if(!split) var all = beginning(head);

    for (var tile = seen_here.from_position / LANES * LANES; tile < seen_here.to_position; tile += LANES) {
        @if(!split) {
            if tile % SPLIT == 0u && tile > first {
                merge(&all, &sums);
                sums = nothing();
            }
        }
        let from_lane = max(first, tile) - tile;
        let to_lane = min(LANES, query.position - tile + 1u);
        if lane >= from_lane && lane < to_lane {
            let position = tile + lane;
            let slot = block_of(query, position / BLOCK) * BLOCK + position % BLOCK;
            let row = cached_row(slot, p.cache_stride4, p.part4);
            rows[lane] = row;
            let k_base = cached_column(key_head * p.d4, p.part4);
            var sum = vec4<f32>(0.0);
            for (var d = 0u; d < p.d4; d++) {
                sum = fma(q[q_base + d], cached(row, k_base + d), sum);
            }
            scores[lane] = ((sum.x + sum.y) + (sum.z + sum.w)) * p.scale;
        }
        workgroupBarrier();

        var tile_max = sums.largest;
        for (var i = from_lane; i < to_lane; i++) {
            tile_max = max(tile_max, scores[i]);
        }
        let correction = exp(sums.largest - tile_max);
        sums.largest = tile_max;
        sums.denominator *= correction;
        for (var c = 0u; c < COLUMNS; c++) {
            sums.values[c] *= correction;
        }
        for (var i = from_lane; i < to_lane; i++) {
            let weight = exp(scores[i] - tile_max);
            sums.denominator += weight;
            let v_base = cached_column(p.v_offset4 + key_head * p.v_head4, p.part4);
            for (var c = 0u; c < COLUMNS; c++) {
                let column = c * LANES + lane;
                if column < p.v4 {
                    sums.values[c] = fma(vec4<f32>(weight), cached(rows[i], v_base + column), sums.values[c]);
                }
            }
        }
        workgroupBarrier();
    }

    let row = token * groups.x + head;
    @if(split) {
        // A context with fewer splits than the longest one has nothing for the last of them.
        if seen_here.from_position < seen_here.to_position {
            write(row, group.z, groups.z, &sums, LANES, lane);
        }
    }
    @else {
        merge(&all, &sums);
        write(row, 0u, 1u, &all, LANES, lane);
    }
}

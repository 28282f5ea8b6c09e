// y[t, n] = (x[t] . w[n] (+ bias[n])) * scale (+ residual[t, n]); a lane makes a tile. Rows of x and y may
// be parts of wider rows. With several heads (workgroups along z) each has its own w, and its own
// stretch of x and y. Where the rows are queries, keys and values and nothing else is done to them (`keeps`), it also turns queries and
// keys by their positions and puts keys and values into the cache, rounded to its type, as `place.wgsl` does it.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, row_of};
import package::shared::weight::{column_start, column_step};
@if(coop) import package::shared::cooperative::{Lane, TILE_COLUMNS4, block_at, product, product_at, starts};
@elif(dot) import package::shared::dot::product;
@else import package::shared::product::product; // binding 1: x [T, x_stride/4], binding 2: w [heads, N, ..]
import package::shared::cached::{Cached, cached_column, cached_row, narrowed};
import package::shared::texel::texel_of;

struct Params {
    rows: u32,          // T
    k4: u32,            // K / 4, the inner dimension
    n4: u32,            // ceil(N / 4); rows of w beyond N are 0
    w_units: u32,       // units of weights in a row of w
    w_stride: u32,      // units of a row of w, those of its scales included
    x_stride4: u32,     // of a row of x
    x_head4: u32,       // from a head's stretch of x to the next
    y_stride4: u32,     // of a row of y and residual
    y_offset4: u32,     // of the first head's stretch
    y_head4: u32,       // from a head's stretch of y to the next
    has_bias: u32,
    has_residual: u32,
    scale: f32,
    // Where rows are kept:
    kept_from4: u32,    // columns from here on go to the cache
    turned4: u32,       // columns before this one turn
    half4: u32,         // half of a head, whose columns i and half + i are a pair; 0: none turns
    part4: u32,         // of a row of the cache (`cached_row`)
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;     // [heads, N/4], any buffer without a bias
@if(!keeps) @group(0) @binding(4) var<storage, read> residual: array<vec4<f32>>; // as y, any buffer without a residual
@if(keeps) @group(0) @binding(4) var<storage, read> turns: array<vec4<f32>>; // [T, half/2] cosines and sines of two pairs
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;  // [T, y_stride/4]
@if(keeps) @group(0) @binding(6) var<storage, read> slots: array<u32>; // [T] position within the cache
// [slots] of rows (`cached_row`)
@if(keeps && image && kv16) @group(0) @binding(7) var cache: texture_storage_2d<rg32uint, write>;
@elif(keeps && image) @group(0) @binding(7) var cache: texture_storage_2d<rgba32uint, write>;
@elif(keeps) @group(0) @binding(7) var<storage, read_write> cache: array<Cached>;

override WORKGROUP: u32 = 32u;

// The c-th vec4 of columns of a lane: where pairs turn, a lane has both halves of them.
fn column_of(group: u32, lane: u32, c: u32) -> u32 {
    @if(keeps) {
        if p.half4 > 0u {
            let i = group * WORKGROUP + lane;
            return i / p.half4 * 2u * p.half4 + i % p.half4 + c * p.half4;
        }
    }
    return (group * COLUMNS + c) * WORKGROUP + lane;
}

@if(keeps) fn put(i: u32, value: Cached) {
    @if(image && kv16) textureStore(cache, texel_of(i), vec4<u32>(value, 0u, 0u));
    @elif(image) textureStore(cache, texel_of(i), bitcast<vec4<u32>>(value));
    @else cache[i] = value;
}

@if(keeps) fn keep(sums: ptr<function, Sums>, columns: PerColumn, first: u32, last: u32) {
    var to = columns;
    for (var r = 0u; r < TILE_ROWS; r++) {
        let row = first + r;
        if row > last {
            continue;
        }
        var values: array<vec4<f32>, COLUMNS>;
        for (var c = 0u; c < COLUMNS; c++) {
            var added = vec4<f32>(0.0);
            if p.has_bias != 0u {
                added = bias[min(to[c], p.n4 - 1u)];
            }
            values[c] = ((*sums)[c][r] + added) * p.scale;
        }
        if to[0] < p.turned4 {
            let at = row * 2u * p.half4 + 2u * (to[0] % (2u * p.half4));
            let two = turns[at];
            let next = turns[at + 1u];
            let cosines = vec4<f32>(two.xz, next.xz);
            let sines = vec4<f32>(two.yw, next.yw);
            let a = values[0];
            let b = values[1];
            values[0] = a * cosines - b * sines;
            values[1] = b * cosines + a * sines;
        }
        for (var c = 0u; c < COLUMNS; c++) {
            if to[c] < p.n4 {
                y[row * p.y_stride4 + to[c]] = values[c];
                if to[c] >= p.kept_from4 {
                    let begin = cached_row(slots[row], p.n4 - p.kept_from4, p.part4);
                    put(begin + cached_column(to[c] - p.kept_from4, p.part4), narrowed(values[c]));
                }
            }
        }
    }
}

// Tiles of rows along x, which is the fastest: those of the same columns follow each other and find the weights in a cache.
@if(!coop) @compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.z;
    let first = group.x * TILE_ROWS;
    let last = p.rows - 1u;
    var starts: Starts;
    for (var l = 0u; l < LOADS; l++) {
        starts[l] = min(first + row_of(l, lane, TILE_ROWS), last) * p.x_stride4 + head * p.x_head4;
    }
    // Lanes beyond the last column work on it again, as lanes need each other.
    var columns: PerColumn;
    var w_at: PerColumn;
    var steps: PerColumn;
    for (var c = 0u; c < COLUMNS; c++) {
        columns[c] = column_of(group.y, lane, c);
        let column = min(columns[c], p.n4 - 1u);
        w_at[c] = head * p.n4 * 4u * p.w_stride + column_start(column, p.w_stride);
        steps[c] = column_step(column, p.n4);
    }
    var sums: Sums;
    product(&sums, starts, w_at, steps, p.w_units, p.k4, lane);
    @if(keeps) {
        keep(&sums, columns, first, last);
    }
    @else {
        for (var c = 0u; c < COLUMNS; c++) {
            let column = columns[c];
            if column >= p.n4 {
                continue;
            }
            var added = vec4<f32>(0.0);
            if p.has_bias != 0u {
                added = bias[head * p.n4 + column];
            }
            for (var r = 0u; r < TILE_ROWS; r++) {
                if first + r <= last {
                    var value = (sums[c][r] + added) * p.scale;
                    let at = (first + r) * p.y_stride4 + p.y_offset4 + head * p.y_head4 + column;
                    if p.has_residual != 0u {
                        value += residual[at];
                    }
                    y[at] = value;
                }
            }
        }
    }
}

// On matrix units a workgroup makes its tile together.
@if(coop) @compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) within: u32,
    @builtin(subgroup_size) width: u32,
) {
    let lane = Lane(index, WORKGROUP, subgroup, subgroups, within, width);
    let head = group.z;
    let first = group.x * TILE_ROWS;
    let rows = min(TILE_ROWS, p.rows - first);
    for (var r = index; r < TILE_ROWS; r += WORKGROUP) {
        starts[r] = (first + min(r, rows - 1u)) * p.x_stride4 + head * p.x_head4;
    }
    let matrix = head * p.n4 * 4u * p.w_stride;
    let column = group.y * TILE_COLUMNS4;
    let blocks = array(
        block_at(matrix, column, p.w_stride, p.n4),
        block_at(matrix, column + TILE_COLUMNS4 / 2u, p.w_stride, p.n4),
    );
    product(lane, blocks, p.w_units, p.k4);
    for (var i = index; i < rows * TILE_COLUMNS4; i += WORKGROUP) {
        let row = i / TILE_COLUMNS4;
        let to = column + i % TILE_COLUMNS4;
        if to >= p.n4 {
            continue;
        }
        var value = product_at(row, i % TILE_COLUMNS4);
        if p.has_bias != 0u {
            value += bias[head * p.n4 + to];
        }
        value *= p.scale;
        let at = (first + row) * p.y_stride4 + p.y_offset4 + head * p.y_head4 + to;
        if p.has_residual != 0u {
            value += residual[at];
        }
        y[at] = value;
    }
}

// a[pair] = activation(w1[expert] x[row] (+ b1[expert])), a workgroup per (tile of pairs, group of columns). A gated
// activation takes two products: w1 holds an expert's gate rows, then its up rows.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, row_of, worked_on};
import package::shared::weight::{column_start, column_step};
@if(coop) import package::shared::cooperative::{Lane, TILE_COLUMNS4, block_at, product, product_at, starts};
@elif(dot) import package::shared::dot::product_of;
@else import package::shared::product::product_of; // binding 1: x [.., H/4] normed rows, binding 2: w1 [experts, MATRICES, I, ..]
import package::shared::pair::{Pair, Tile};
import package::shared::activation::{clamped_glu, gelu, swiglu};

struct Params {
    h4: u32,          // H / 4
    i4: u32,          // ceil(I / 4)
    w_units: u32,     // units of weights in a row of w1
    w_stride: u32,    // units of a row of w1, those of its scales included
    first_tile: u32,
    has_bias: u32,
    first_expert: u32, // of those whose matrices are bound; tiles of others leave at once
    experts: u32,
    limit: f32,       // of what is clamped
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> pairs: array<Pair>;
@group(0) @binding(4) var<storage, read> tiles: array<Tile>;
@group(0) @binding(5) var<storage, read> b1: array<vec4<f32>>;      // [experts, MATRICES, I/4], any buffer without
@group(0) @binding(6) var<storage, read_write> a: array<vec4<f32>>; // [pairs, I/4]

override WORKGROUP: u32 = 32u;
@if(swiglu || clamped_glu) const MATRICES: u32 = 2u;
@else const MATRICES: u32 = 1u;

// No branch on a uniform: lavapipe works on both sides, and may compile a kernel anew for every value (`shared/product.wgsl`).
fn bias_at(i: u32) -> vec4<f32> {
    return select(vec4<f32>(0.0), b1[select(0u, i, p.has_bias != 0u)], p.has_bias != 0u);
}

@if(!coop) @compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = tiles[p.first_tile + group.x];
    let expert = tile.expert - p.first_expert;
    if expert >= p.experts {
        return;
    }
    let last = tile.count - 1u;
    let rows = worked_on(tile.count);
    var starts: Starts;
    for (var l = 0u; l < LOADS; l++) {
        starts[l] = pairs[tile.first + min(row_of(l, lane, rows), last)].row * p.h4;
    }
    var columns: PerColumn;
    for (var c = 0u; c < COLUMNS; c++) {
        columns[c] = (group.y * COLUMNS + c) * WORKGROUP + lane;
    }
    var sums: array<Sums, MATRICES>;
    for (var m = 0u; m < MATRICES; m++) {
        let matrix = (expert * MATRICES + m) * p.i4;
        var w_at: PerColumn;
        var steps: PerColumn;
        for (var c = 0u; c < COLUMNS; c++) {
            let column = min(columns[c], p.i4 - 1u);
            w_at[c] = matrix * 4u * p.w_stride + column_start(column, p.w_stride);
            steps[c] = column_step(column, p.i4);
        }
        var one: Sums;
        product_of(&one, starts, w_at, steps, p.w_units, p.h4, lane, rows);
        for (var c = 0u; c < COLUMNS; c++) {
            let bias = bias_at(matrix + min(columns[c], p.i4 - 1u));
            for (var r = 0u; r < TILE_ROWS; r++) {
                one[c][r] += bias;
            }
        }
        sums[m] = one;
    }
    for (var c = 0u; c < COLUMNS; c++) {
        if columns[c] >= p.i4 {
            continue;
        }
        for (var r = 0u; r < TILE_ROWS; r++) {
            if r <= last {
                @if(swiglu) let value = swiglu(sums[0][c][r], sums[1][c][r]);
                @elif(clamped_glu) let value = clamped_glu(sums[0][c][r], sums[1][c][r], p.limit);
                @else let value = gelu(sums[0][c][r]);
                a[(tile.first + r) * p.i4 + columns[c]] = value;
            }
        }
    }
}

// On matrix units a workgroup makes its tile together: of two matrices a block of columns each.
@if(coop) @compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) within: u32,
    @builtin(subgroup_size) width: u32,
) {
    let tile = tiles[p.first_tile + group.x];
    let expert = tile.expert - p.first_expert;
    if expert >= p.experts {
        return;
    }
    for (var r = index; r < TILE_ROWS; r += WORKGROUP) {
        starts[r] = pairs[tile.first + min(r, tile.count - 1u)].row * p.h4;
    }
    const COLUMNS4: u32 = TILE_COLUMNS4 / MATRICES;
    let column = group.y * COLUMNS4;
    let units = p.i4 * 4u * p.w_stride; // of a matrix
    let matrix = expert * MATRICES * units;
    @if(swiglu || clamped_glu) let second = block_at(matrix + units, column, p.w_stride, p.i4);
    @else let second = block_at(matrix, column + TILE_COLUMNS4 / 2u, p.w_stride, p.i4);
    let lane = Lane(index, WORKGROUP, subgroup, subgroups, within, width);
    product(lane, array(block_at(matrix, column, p.w_stride, p.i4), second), p.w_units, p.h4);
    for (var i = index; i < tile.count * COLUMNS4; i += WORKGROUP) {
        let row = i / COLUMNS4;
        let to = column + i % COLUMNS4;
        if to >= p.i4 {
            continue;
        }
        var sums: array<vec4<f32>, MATRICES>;
        for (var m = 0u; m < MATRICES; m++) {
            sums[m] = product_at(row, m * COLUMNS4 + i % COLUMNS4) + bias_at((expert * MATRICES + m) * p.i4 + to);
        }
        @if(swiglu) let value = swiglu(sums[0], sums[1]);
        @elif(clamped_glu) let value = clamped_glu(sums[0], sums[1], p.limit);
        @else let value = gelu(sums[0]);
        a[(tile.first + row) * p.i4 + to] = value;
    }
}

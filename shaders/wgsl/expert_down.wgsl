// partial[slot] = weight * scale * (w2[expert] a[pair] (+ b2[expert])), a workgroup per (tile of pairs, group of columns).
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, row_of, worked_on};
import package::shared::weight::{column_start, column_step};
@if(coop) import package::shared::cooperative::{Lane, TILE_COLUMNS4, block_at, product, product_at, starts};
@elif(dot) import package::shared::dot::product_of;
@else import package::shared::product::product_of; // binding 1: a [pairs, I/4], binding 2: w2 [experts, H, ..]
import package::shared::pair::{Pair, Tile};

struct Params {
    i4: u32,          // ceil(I / 4)
    h4: u32,          // H / 4
    w_units: u32,     // units of weights in a row of w2
    w_stride: u32,    // units of a row of w2, those of its scales included
    first_tile: u32,
    has_bias: u32,
    first_expert: u32, // of those whose matrices are bound; tiles of others leave at once
    experts: u32,
    scale: f32,       // of what a layer adds to the residual stream
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(3) var<storage, read> pairs: array<Pair>;
@group(0) @binding(4) var<storage, read> tiles: array<Tile>;
@group(0) @binding(5) var<storage, read> b2: array<vec4<f32>>;             // [experts, H/4], any buffer without
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>; // [slots, H/4]

override WORKGROUP: u32 = 32u;

// As in `expert_up.wgsl`.
fn bias_at(i: u32) -> vec4<f32> {
    return select(vec4<f32>(0.0), b2[select(0u, i, p.has_bias != 0u)], p.has_bias != 0u);
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
        starts[l] = (tile.first + min(row_of(l, lane, rows), last)) * p.i4;
    }
    var columns: PerColumn;
    var w_at: PerColumn;
    var steps: PerColumn;
    for (var c = 0u; c < COLUMNS; c++) {
        columns[c] = (group.y * COLUMNS + c) * WORKGROUP + lane;
        let column = min(columns[c], p.h4 - 1u);
        w_at[c] = expert * p.h4 * 4u * p.w_stride + column_start(column, p.w_stride);
        steps[c] = column_step(column, p.h4);
    }
    var sums: Sums;
    product_of(&sums, starts, w_at, steps, p.w_units, p.i4, lane, rows);
    for (var c = 0u; c < COLUMNS; c++) {
        let column = columns[c];
        if column >= p.h4 {
            continue;
        }
        let bias = bias_at(expert * p.h4 + column);
        for (var r = 0u; r < TILE_ROWS; r++) {
            if r <= last {
                let pair = pairs[tile.first + r];
                partials[pair.slot * p.h4 + column] = pair.weight * p.scale * (sums[c][r] + bias);
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
    let tile = tiles[p.first_tile + group.x];
    let expert = tile.expert - p.first_expert;
    if expert >= p.experts {
        return;
    }
    for (var r = index; r < TILE_ROWS; r += WORKGROUP) {
        starts[r] = (tile.first + min(r, tile.count - 1u)) * p.i4;
    }
    let column = group.y * TILE_COLUMNS4;
    let matrix = expert * p.h4 * 4u * p.w_stride;
    let blocks = array(
        block_at(matrix, column, p.w_stride, p.h4),
        block_at(matrix, column + TILE_COLUMNS4 / 2u, p.w_stride, p.h4),
    );
    product(Lane(index, WORKGROUP, subgroup, subgroups, within, width), blocks, p.w_units, p.i4);
    for (var i = index; i < tile.count * TILE_COLUMNS4; i += WORKGROUP) {
        let to = column + i % TILE_COLUMNS4;
        if to >= p.h4 {
            continue;
        }
        let pair = pairs[tile.first + i / TILE_COLUMNS4];
        let sum = product_at(i / TILE_COLUMNS4, i % TILE_COLUMNS4) + bias_at(expert * p.h4 + to);
        partials[pair.slot * p.h4 + to] = pair.weight * p.scale * sum;
    }
}

// a[pair] = activation(w1[expert] x[row] (+ b1[expert])), a workgroup per (tile of pairs, group of columns). A gated
// activation takes two products: w1 holds an expert's gate rows, then its up rows.
import package::shared::tile::{TILE_ROWS, accumulate};
import package::shared::weight::{Weights, widen};
import package::shared::pair::{Pair, Tile};
import package::shared::activation::{clamped_glu, gelu, swiglu};

struct Params {
    h4: u32,          // H / 4
    i4: u32,          // ceil(I / 4)
    first_tile: u32,
    has_bias: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> pairs: array<Pair>;
@group(0) @binding(2) var<storage, read> tiles: array<Tile>;
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;       // [.., H/4] normed rows
@group(0) @binding(4) var<storage, read> w1: array<Weights>;        // [experts, MATRICES, I, H/4]
@group(0) @binding(5) var<storage, read> b1: array<vec4<f32>>;      // [experts, MATRICES, I/4], any buffer without
@group(0) @binding(6) var<storage, read_write> a: array<vec4<f32>>; // [pairs, I/4]

override WORKGROUP: u32 = 32u;
@if(swiglu || clamped_glu) const MATRICES: u32 = 2u;
@else const MATRICES: u32 = 1u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.x * WORKGROUP + lane;
    if column >= p.i4 {
        return;
    }
    let tile = tiles[p.first_tile + group.y];
    let last = tile.count - 1u;
    var rows: array<u32, TILE_ROWS>;
    for (var r = 0u; r < TILE_ROWS; r++) {
        rows[r] = pairs[tile.first + min(r, last)].row * p.h4;
    }
    var acc: array<array<vec4<f32>, TILE_ROWS>, MATRICES>;
    for (var m = 0u; m < MATRICES; m++) {
        let w_base = ((tile.expert * MATRICES + m) * p.i4 + column) * 4u * p.h4;
        for (var k = 0u; k < p.h4; k++) {
            let w_0 = widen(w1[w_base + k]);
            let w_1 = widen(w1[w_base + p.h4 + k]);
            let w_2 = widen(w1[w_base + 2u * p.h4 + k]);
            let w_3 = widen(w1[w_base + 3u * p.h4 + k]);
            for (var r = 0u; r < TILE_ROWS; r++) {
                acc[m][r] = accumulate(acc[m][r], x[rows[r] + k], w_0, w_1, w_2, w_3);
            }
        }
        if p.has_bias != 0u {
            let bias = b1[(tile.expert * MATRICES + m) * p.i4 + column];
            for (var r = 0u; r < TILE_ROWS; r++) {
                acc[m][r] += bias;
            }
        }
    }
    for (var r = 0u; r < TILE_ROWS; r++) {
        if r <= last {
            @if(swiglu) let value = swiglu(acc[0][r], acc[1][r]);
            @elif(clamped_glu) let value = clamped_glu(acc[0][r], acc[1][r]);
            @else let value = gelu(acc[0][r]);
            a[(tile.first + r) * p.i4 + column] = value;
        }
    }
}

// partial[slot] = weight * scale * (w2[expert] a[pair] (+ b2[expert])), a workgroup per (tile of pairs, group of columns).
import package::shared::tile::{TILE_ROWS, accumulate};
import package::shared::weight::{Weights, widen};
import package::shared::pair::{Pair, Tile};

struct Params {
    i4: u32,          // ceil(I / 4)
    h4: u32,          // H / 4
    first_tile: u32,
    has_bias: u32,
    scale: f32,       // of what a layer adds to the residual stream
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> pairs: array<Pair>;
@group(0) @binding(2) var<storage, read> tiles: array<Tile>;
@group(0) @binding(3) var<storage, read> a: array<vec4<f32>>;              // [pairs, I/4]
@group(0) @binding(4) var<storage, read> w2: array<Weights>;               // [experts, H, I/4]
@group(0) @binding(5) var<storage, read> b2: array<vec4<f32>>;             // [experts, H/4], any buffer without
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>; // [slots, H/4]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.x * WORKGROUP + lane;
    if column >= p.h4 {
        return;
    }
    let tile = tiles[p.first_tile + group.y];
    let last = tile.count - 1u;
    var acc: array<vec4<f32>, TILE_ROWS>;
    let w_base = (tile.expert * p.h4 + column) * 4u * p.i4;
    for (var k = 0u; k < p.i4; k++) {
        let w_0 = widen(w2[w_base + k]);
        let w_1 = widen(w2[w_base + p.i4 + k]);
        let w_2 = widen(w2[w_base + 2u * p.i4 + k]);
        let w_3 = widen(w2[w_base + 3u * p.i4 + k]);
        for (var r = 0u; r < TILE_ROWS; r++) {
            acc[r] = accumulate(acc[r], a[(tile.first + min(r, last)) * p.i4 + k], w_0, w_1, w_2, w_3);
        }
    }
    var bias = vec4<f32>(0.0);
    if p.has_bias != 0u {
        bias = b2[tile.expert * p.h4 + column];
    }
    for (var r = 0u; r < TILE_ROWS; r++) {
        if r <= last {
            let pair = pairs[tile.first + r];
            partials[pair.slot * p.h4 + column] = pair.weight * p.scale * (acc[r] + bias);
        }
    }
}

// Count, scan and permute in one workgroup: sorts the T * K (token, expert) pairs by expert, keeps the tokens'
// order within an expert, cuts them into tiles and writes the sizes of the two expert launches.
import package::shared::tile::TILE_ROWS;
import package::shared::pair::{Pair, Tile};

struct Params {
    pairs: u32,      // T * K
    top_k: u32,      // K
    experts: u32,    // E
    up_groups: u32,  // workgroups along the columns of expert_up
    down_groups: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> chosen: array<u32>;           // [T, K]
@group(0) @binding(2) var<storage, read> weights: array<f32>;          // [T, K]
@group(0) @binding(3) var<storage, read_write> pairs: array<Pair>;     // [T * K]
@group(0) @binding(4) var<storage, read_write> tiles: array<Tile>;     // at most [T * K]
@group(0) @binding(5) var<storage, read_write> launches: array<u32>;   // [2, 3] expert_up, expert_down

const LANES: u32 = 64u;
var<workgroup> counts: array<u32, 1024>;
var<workgroup> pair_starts: array<u32, 1024>;
var<workgroup> tile_starts: array<u32, 1024>;

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32) {
    for (var e = lane; e < p.experts; e += LANES) {
        var count = 0u;
        for (var i = 0u; i < p.pairs; i++) {
            count += select(0u, 1u, chosen[i] == e);
        }
        counts[e] = count;
    }
    workgroupBarrier();
    if lane == 0u {
        var pair_start = 0u;
        var tile_start = 0u;
        for (var e = 0u; e < p.experts; e++) {
            pair_starts[e] = pair_start;
            tile_starts[e] = tile_start;
            pair_start += counts[e];
            tile_start += (counts[e] + TILE_ROWS - 1u) / TILE_ROWS;
        }
        launches[0] = tile_start;
        launches[1] = p.up_groups;
        launches[2] = 1u;
        launches[3] = tile_start;
        launches[4] = p.down_groups;
        launches[5] = 1u;
    }
    workgroupBarrier();
    for (var e = lane; e < p.experts; e += LANES) {
        if counts[e] == 0u {
            continue;
        }
        var next = pair_starts[e];
        for (var i = 0u; i < p.pairs; i++) {
            if chosen[i] == e {
                pairs[next] = Pair(i / p.top_k, i, weights[i], e);
                next++;
            }
        }
        for (var done = 0u; done < counts[e]; done += TILE_ROWS) {
            let count = min(TILE_ROWS, counts[e] - done);
            tiles[tile_starts[e] + done / TILE_ROWS] = Tile(e, pair_starts[e] + done, count, 0u);
        }
    }
}

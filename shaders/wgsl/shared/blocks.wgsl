// How a product's sum over k is cut: into blocks of 512 columns at absolute multiples of 512. Within a block k ascends, one fma
// each, from 0; the blocks are added ascending, from 0. One lane makes one block after the other, or (`split_k`) four groups of
// eight lanes make four blocks at once and meet in workgroup memory, so that a few rows keep a GPU's cores busy: the same bits.
import package::shared::tile::{COLUMNS, Sums, TILE_ROWS};

// vec4s of k in a block.
const BLOCK_K4: u32 = 128u;

// Blocks that a workgroup makes at once.
@if(split_k) const SPLITS: u32 = 4u;
@else const SPLITS: u32 = 1u;

// Lanes of a workgroup with columns of their own, where each makes all of k.
@if(split_k) const COLUMN_LANES: u32 = 8u;
@if(split_k) var<workgroup> made_blocks: array<vec4<f32>, SPLITS * COLUMN_LANES * COLUMNS>;

// Lanes with columns of their own, in a workgroup of so many.
fn column_lanes(workgroup: u32) -> u32 {
    @if(split_k) return COLUMN_LANES;
    @else return workgroup;
}

// Which of them a lane is, or makes another part of k for.
fn column_lane(lane: u32) -> u32 {
    @if(split_k) return lane % COLUMN_LANES;
    @else return lane;
}

// Which of the blocks that are made at once is a lane's.
fn split_of(lane: u32) -> u32 {
    @if(split_k) return lane / COLUMN_LANES;
    @else return 0u;
}

// Adds to the first `rows` rows of the sums what lanes made of the next `count` blocks. All lanes of a workgroup call it.
fn add_blocks(sums: ptr<function, Sums>, made: ptr<function, Sums>, count: u32, lane: u32, rows: u32) {
    @if(split_k) {
        for (var r = 0u; r < rows; r++) {
            for (var c = 0u; c < COLUMNS; c++) {
                made_blocks[c * SPLITS * COLUMN_LANES + lane] = (*made)[c][r];
            }
            workgroupBarrier();
            for (var s = 0u; s < min(count, SPLITS); s++) {
                for (var c = 0u; c < COLUMNS; c++) {
                    let at = (c * SPLITS + s) * COLUMN_LANES + lane % COLUMN_LANES;
                    (*sums)[c][r] += made_blocks[at];
                }
            }
            workgroupBarrier();
        }
    }
    @else {
        for (var r = 0u; r < rows; r++) {
            for (var c = 0u; c < COLUMNS; c++) {
                (*sums)[c][r] += (*made)[c][r];
            }
        }
    }
}

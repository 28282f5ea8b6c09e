// The product that every matrix kernel makes: a tile of rows of x times a lane's rows of w.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, accumulate};
import package::shared::weight::{BLOCK4, UNIT4, Unit, scale_of, widen};
import package::shared::matrix::unit_at; // binding 2
import package::shared::blocks::{BLOCK_K4, SPLITS, add_blocks, split_of};

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;

alias Units = array<array<Unit, 4>, COLUMNS>;

// vec4s of k that one turn of the loop takes.
@if(turn2) const TURN4: u32 = 2u;
@elif(turn4) const TURN4: u32 = 4u;
@elif(turn8) const TURN4: u32 = 8u;
@else const TURN4: u32 = 1u;

// What a lane has loaded and still uses.
struct Held {
    rows: array<vec4<f32>, LOADS>,
    units: Units,
    scales: array<array<f32, 4>, COLUMNS>,
}

// Where a lane loads: the vec4s of x at which its rows begin, where its columns begin in w, how far their units are
// from each other, and which part of a row it loads for others.
struct From {
    rows: Starts,
    columns: PerColumn,
    steps: PerColumn,
    part: u32,
}

// vec4s of a row that lanes load at once: eight lanes share up to eight rows, and the parts of fewer.
fn parts_of(rows: u32) -> u32 {
    @if(subgroup) return min(max(8u / rows, 1u), TURN4);
    @else return 1u;
}

// Rows that a lane loads itself.
fn loads_of(rows: u32) -> u32 {
    @if(subgroup) return max(rows / 8u, 1u);
    @else return rows;
}

// vec4 `k + i` of the first `rows` rows of x times the weights there. `i` and `rows` are constants, so that what depends on them
// alone is none of the loop's work.
fn add_vec4(sums: ptr<function, Sums>, held: ptr<function, Held>, lane: From, k: u32, i: u32, k4: u32, rows: u32) {
    var lane_from = lane;
    let parts = parts_of(rows);
    if i % parts == 0u {
        // Weights beyond the row's end are 0: any value stands for those of x there.
        let at = min(k + i + lane.part, k4 - 1u);
        for (var l = 0u; l < loads_of(rows); l++) {
            (*held).rows[l] = x[lane_from.rows[l] + at];
        }
    }
    if i % UNIT4 == 0u {
        let unit = (k + i) / UNIT4;
        for (var c = 0u; c < COLUMNS; c++) {
            for (var j = 0u; j < 4u; j++) {
                (*held).units[c][j] = unit_at(lane_from.columns[c] + (4u * unit + j) * lane_from.steps[c]);
            }
        }
    }
    var wide: array<array<vec4<f32>, 4>, COLUMNS>;
    for (var c = 0u; c < COLUMNS; c++) {
        for (var j = 0u; j < 4u; j++) {
            wide[c][j] = widen((*held).units[c][j], i % UNIT4);
            @if(q8 || q4 || mx4) wide[c][j] *= (*held).scales[c][j];
        }
    }
    for (var r = 0u; r < rows; r++) {
        let from_lane = i % parts * rows + r;
        @if(subgroup) let row = subgroupShuffle((*held).rows[from_lane / 8u], from_lane % 8u);
        @else let row = (*held).rows[r];
        for (var c = 0u; c < COLUMNS; c++) {
            let sum = (*sums)[c][r];
            (*sums)[c][r] = accumulate(sum, row, wide[c][0], wide[c][1], wide[c][2], wide[c][3]);
        }
    }
}

// TURN4 vec4s of k. They are written out: a loop that a driver does not unroll copies all sums at each turn.
fn turn(sums: ptr<function, Sums>, held: ptr<function, Held>, lane: From, k: u32, k4: u32, rows: u32) {
    add_vec4(sums, held, lane, k, 0u, k4, rows);
    @if(turn2 || turn4 || turn8) {
        add_vec4(sums, held, lane, k, 1u, k4, rows);
    }
    @if(turn4 || turn8) {
        add_vec4(sums, held, lane, k, 2u, k4, rows);
        add_vec4(sums, held, lane, k, 3u, k4, rows);
    }
    @if(turn8) {
        add_vec4(sums, held, lane, k, 4u, k4, rows);
        add_vec4(sums, held, lane, k, 5u, k4, rows);
        add_vec4(sums, held, lane, k, 6u, k4, rows);
        add_vec4(sums, held, lane, k, 7u, k4, rows);
    }
}

// The units that hold the scales of the block of k at vec4 `first`: one a row, for eight of those blocks that share a scale.
@if(q8 || q4 || mx4) fn scales_at(lane: From, units: u32, first: u32) -> Units {
    var lane_from = lane;
    let unit = units + min(first, units * UNIT4 - 1u) / BLOCK_K4;
    var eight: Units;
    for (var c = 0u; c < COLUMNS; c++) {
        for (var j = 0u; j < 4u; j++) {
            eight[c][j] = unit_at(lane_from.columns[c] + (4u * unit + j) * lane_from.steps[c]);
        }
    }
    return eight;
}

// The block of k that begins at vec4 `first`, up to vec4 `end`: for the first `rows` rows.
fn add_block(sums: ptr<function, Sums>, lane: From, units: u32, first: u32, end: u32, k4: u32, rows: u32) {
    var held: Held;
    @if(q8 || q4 || mx4) var eight = scales_at(lane, units, first);
    // Left at its end: where a loop is left at its beginning, lavapipe works through it once more, for no lane.
    var k = first;
    loop {
        @if(split_k) {
            // There may be no such block.
            if k >= end {
                break;
            }
        }
        @if(q8 || q4 || mx4) {
            for (var c = 0u; c < COLUMNS; c++) {
                for (var j = 0u; j < 4u; j++) {
                    held.scales[c][j] = scale_of(eight[c][j], k / BLOCK4);
                }
            }
        }
        turn(sums, &held, lane, k, k4, rows);
        k += TURN4;
        @if(!split_k) {
            if k >= end {
                break;
            }
        }
    }
}

// The blocks that are made at once, from vec4 `first` of k on, for the first `rows` rows; k ends at vec4 `end`.
fn add_some(sums: ptr<function, Sums>, matrix: From, units: u32, first: u32, end: u32, k4: u32, lane: u32, rows: u32) {
    var from_where = matrix;
    from_where.part = lane % 8u / rows % parts_of(rows);
    var made: Sums;
    let mine = first + split_of(lane) * BLOCK_K4;
    add_block(&made, from_where, units, mine, min(mine + BLOCK_K4, end), k4, rows);
    add_blocks(sums, &made, (end - first + BLOCK_K4 - 1u) / BLOCK_K4, lane, rows);
}

// All blocks for the first `rows` rows, or none. A loop of no turns in place of a branch, of which lavapipe works on both sides.
@if(!one && !split_k) fn add_if(
    is_so: bool,
    sums: ptr<function, Sums>,
    matrix: From,
    units: u32,
    k4: u32,
    lane: u32,
    rows: u32,
) {
    let end = select(0u, units * UNIT4, is_so);
    for (var first = 0u; first < end; first += SPLITS * BLOCK_K4) {
        add_some(sums, matrix, units, first, end, k4, lane, rows);
    }
}

// Adds rows of x times rows of w to the sums. `starts` are the vec4s of x at which this lane's rows begin, `columns`
// and `steps` where its columns begin in w and how far units are from each other (`column_start`, `column_step`). The
// first `units` of a row hold the weights of 4 * k4 columns of x and zeros up to whole blocks.
fn product(
    sums: ptr<function, Sums>,
    starts: Starts,
    columns: PerColumn,
    steps: PerColumn,
    units: u32,
    k4: u32,
    lane: u32,
) {
    let end = units * UNIT4;
    var first = 0u;
    loop {
        add_some(sums, From(starts, columns, steps, 0u), units, first, end, k4, lane, TILE_ROWS);
        first += SPLITS * BLOCK_K4;
        if first >= end {
            break;
        }
    }
}

// The same for the first `rows` of them (`worked_on`) alone. Drivers take longer to compile it.
fn product_of(
    sums: ptr<function, Sums>,
    starts: Starts,
    columns: PerColumn,
    steps: PerColumn,
    units: u32,
    k4: u32,
    lane: u32,
    rows: u32,
) {
    @if(one || split_k) {
        product(sums, starts, columns, steps, units, k4, lane);
    }
    @else {
        let matrix = From(starts, columns, steps, 0u);
        add_if(rows == TILE_ROWS, sums, matrix, units, k4, lane, TILE_ROWS);
        add_if(rows == TILE_ROWS / 2u, sums, matrix, units, k4, lane, TILE_ROWS / 2u);
        @if(!tile2) {
            add_if(rows == TILE_ROWS / 4u, sums, matrix, units, k4, lane, TILE_ROWS / 4u);
        }
    }
}

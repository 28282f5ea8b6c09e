// The product that every matrix kernel makes: a tile of rows of x times a lane's rows of w.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, accumulate};
import package::shared::weight::{BLOCK4, UNIT4, Unit, scale_of, widen};
import package::shared::matrix::unit_at; // binding 2

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
        // Column by column, so that the first loads of each, which a CPU did not fetch ahead, do not wait for each other.
        for (var j = 0u; j < 4u; j++) {
            for (var c = 0u; c < COLUMNS; c++) {
                var found = unit_at(lane_from.columns[c] + (4u * unit + j) * lane_from.steps[c]);
                // Of a unit that takes two turns the second half stands where the first one does.
                @if(halves) found = select(found, found.zwzw, k % UNIT4 != 0u);
                (*held).units[c][j] = found;
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

// Drivers of CPUs work through a loop that is left at its beginning once more than it turns, for no lane, and on both sides of a
// branch. So loops that always turn are left at their ends (`always`), and what may have nothing to do is a loop of no turns.
// Where turns are short a loop is left at its beginning nevertheless: at its end all sums would be copied at each turn.
@if(turn4 || turn8) const AT_END: bool = true;
@else const AT_END: bool = false;

// Turns up to vec4 `end` of k, for the first `rows` rows; `always`, a constant: there are some.
fn add_all(
    sums: ptr<function, Sums>,
    matrix: From,
    units: u32,
    end: u32,
    k4: u32,
    lane: u32,
    rows: u32,
    always: bool,
) {
    var held: Held;
    var from_where = matrix;
    from_where.part = lane % 8u / rows % parts_of(rows);
    @if(q8 || q4 || mx4) {
        var lane_from = from_where;
        var k = 0u;
        loop {
            if !always && k >= end {
                break;
            }
            // One unit holds the scales of eight blocks.
            var eight: Units;
            let unit = units + k / (8u * BLOCK4);
            for (var j = 0u; j < 4u; j++) {
                for (var c = 0u; c < COLUMNS; c++) {
                    eight[c][j] = unit_at(lane_from.columns[c] + (4u * unit + j) * lane_from.steps[c]);
                }
            }
            let last = min(k + 8u * BLOCK4, end);
            loop {
                for (var c = 0u; c < COLUMNS; c++) {
                    for (var j = 0u; j < 4u; j++) {
                        held.scales[c][j] = scale_of(eight[c][j], k / BLOCK4);
                    }
                }
                turn(sums, &held, from_where, k, k4, rows);
                k += TURN4;
                if k >= last {
                    break;
                }
            }
            if always && k >= end {
                break;
            }
        }
    }
    @else {
        var k = 0u;
        loop {
            if !(always && AT_END) && k >= end {
                break;
            }
            turn(sums, &held, from_where, k, k4, rows);
            k += TURN4;
            if always && AT_END && k >= end {
                break;
            }
        }
    }
}

// Where k ends. lavapipe compiles a kernel anew for every value of a uniform that alone says how often a loop turns, if it can
// unroll the loop then; for an end that is also of the lane it does not.
fn end_of(units: u32, lane: u32) -> u32 {
    @if(subgroup) return units * UNIT4 + (lane >> 31u);
    @else return units * UNIT4;
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
    add_all(sums, From(starts, columns, steps, 0u), units, end_of(units, lane), k4, lane, TILE_ROWS, true);
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
    let from_where = From(starts, columns, steps, 0u);
    let end = end_of(units, lane);
    @if(one) {
        add_all(sums, from_where, units, end, k4, lane, TILE_ROWS, true);
    }
    @else {
        add_all(sums, from_where, units, select(0u, end, rows == TILE_ROWS), k4, lane, TILE_ROWS, false);
        add_all(sums, from_where, units, select(0u, end, rows == TILE_ROWS / 2u), k4, lane, TILE_ROWS / 2u, false);
        @if(!tile2) {
            add_all(sums, from_where, units, select(0u, end, rows == TILE_ROWS / 4u), k4, lane, TILE_ROWS / 4u, false);
        }
    }
}

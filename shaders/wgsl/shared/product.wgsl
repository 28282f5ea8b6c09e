// The product that every matrix kernel makes: a tile of rows of x times a lane's rows of w.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, accumulate};
import package::shared::weight::{SPAN, UNIT4, Unit, widen};

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w: array<Unit>;

alias Stored = array<array<Unit, 4>, COLUMNS>;
alias Scales = array<array<f32, 4>, COLUMNS>;

// Four columns of x: vec4 `k` of its rows, which is vec4 `i` of the units. With a single row whose parts lanes hand each
// other, `part` is this lane's of the eight that share scales.
fn add_vec4(
    sums: ptr<function, Sums>,
    starts: Starts,
    units: Stored,
    factors: Scales,
    part: vec4<f32>,
    i: u32,
    k: u32,
) {
    var x_at = starts;
    var stored = units;
    var scales = factors;
    var mine: array<vec4<f32>, LOADS>;
    @if(!(subgroup && one)) {
        for (var l = 0u; l < LOADS; l++) {
            mine[l] = x[x_at[l] + k];
        }
    }
    var wide: array<array<vec4<f32>, 4>, COLUMNS>;
    for (var c = 0u; c < COLUMNS; c++) {
        for (var j = 0u; j < 4u; j++) {
            wide[c][j] = widen(stored[c][j], i);
            @if(q8 || q4) wide[c][j] *= scales[c][j];
        }
    }
    for (var r = 0u; r < TILE_ROWS; r++) {
        @if(subgroup && one) let row = subgroupShuffle(part, k % 8u);
        @elif(subgroup) let row = subgroupShuffle(mine[r / 8u], r % 8u);
        @else let row = mine[r];
        for (var c = 0u; c < COLUMNS; c++) {
            let sum = (*sums)[c][r];
            (*sums)[c][r] = accumulate(sum, row, wide[c][0], wide[c][1], wide[c][2], wide[c][3]);
        }
    }
}

// One unit of each of a lane's rows of w.
fn add_unit(
    sums: ptr<function, Sums>,
    starts: Starts,
    columns: PerColumn,
    steps: PerColumn,
    scales: Scales,
    part: vec4<f32>,
    unit: u32,
    k4: u32,
) {
    var w_at = columns;
    var step = steps;
    var stored: Stored;
    for (var c = 0u; c < COLUMNS; c++) {
        for (var j = 0u; j < 4u; j++) {
            stored[c][j] = w[w_at[c] + (4u * unit + j) * step[c]];
        }
    }
    @if(half || q8 || q4) {
        for (var i = 0u; i < UNIT4; i++) {
            // A lane's part beyond the row's end stands for the last one too.
            @if(subgroup && one) let k = unit * UNIT4 + i;
            @else let k = min(unit * UNIT4 + i, k4 - 1u);
            add_vec4(sums, starts, stored, scales, part, i, k);
        }
    }
    @else {
        add_vec4(sums, starts, stored, scales, part, 0u, unit);
    }
}

// Adds rows of x times rows of w to the sums. `starts` are the vec4s of x at which this lane's rows begin, `columns`
// and `steps` where its columns begin in w and how far units are from each other (`column_start`, `column_step`). The
// first `units` of a row hold the weights of 4 * k4 columns of x; weights beyond those are 0. There is no loop of one
// turn: drivers that do not unroll a long one copy all sums at each turn.
fn product(
    sums: ptr<function, Sums>,
    starts: Starts,
    columns: PerColumn,
    steps: PerColumn,
    units: u32,
    k4: u32,
    lane: u32,
) {
    var scales: Scales;
    var part: vec4<f32>;
    for (var block = 0u; block < units; block += SPAN) {
        @if(q8 || q4) {
            var w_at = columns;
            var step = steps;
            let at = block / SPAN;
            @if(subgroup && one) {
                var x_at = starts;
                part = x[x_at[0] + min(8u * at + lane % 8u, k4 - 1u)];
            }
            for (var c = 0u; c < COLUMNS; c++) {
                for (var j = 0u; j < 4u; j++) {
                    let two = w[w_at[c] + (4u * (units + at / 8u) + j) * step[c]][at / 2u % 4u];
                    scales[c][j] = unpack2x16float(two)[at % 2u];
                }
            }
        }
        @if(q8) {
            for (var s = 0u; s < SPAN; s++) {
                add_unit(sums, starts, columns, steps, scales, part, block + s, k4);
            }
        }
        @else {
            add_unit(sums, starts, columns, steps, scales, part, block, k4);
        }
    }
}

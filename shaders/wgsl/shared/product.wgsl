// The product that every matrix kernel makes: a tile of rows of x times a lane's rows of w.
import package::shared::tile::{COLUMNS, LOADS, PerColumn, Starts, Sums, TILE_ROWS, accumulate};
import package::shared::weight::{SPAN, UNIT4, Unit, widen};

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> w: array<Unit>;

// Adds rows of x times rows of w to the sums. `starts` are the vec4s of x at which this lane's rows begin, `columns`
// and `steps` where its columns begin in w and how far units are from each other (`column_start`, `column_step`). The
// first `units` of a row hold the weights of 4 * k4 columns of x; weights beyond those are 0.
fn product(sums: ptr<function, Sums>, starts: Starts, columns: PerColumn, steps: PerColumn, units: u32, k4: u32) {
    var x_at = starts;
    var w_at = columns;
    var step = steps;
    for (var block = 0u; block < units; block += SPAN) {
        @if(q8 || q4) var scales: array<array<f32, 4>, COLUMNS>;
        @if(q8 || q4) {
            let at = block / SPAN;
            for (var c = 0u; c < COLUMNS; c++) {
                for (var j = 0u; j < 4u; j++) {
                    let two = w[w_at[c] + (4u * (units + at / 8u) + j) * step[c]][at / 2u % 4u];
                    scales[c][j] = unpack2x16float(two)[at % 2u];
                }
            }
        }
        // Bounds that are constants: loops that are not unrolled copy all sums on some CPUs' drivers.
        for (var s = 0u; s < SPAN; s++) {
            let unit = block + s;
            var stored: array<array<Unit, 4>, COLUMNS>;
            for (var c = 0u; c < COLUMNS; c++) {
                for (var j = 0u; j < 4u; j++) {
                    stored[c][j] = w[w_at[c] + (4u * unit + j) * step[c]];
                }
            }
            for (var i = 0u; i < UNIT4; i++) {
                let k = min(unit * UNIT4 + i, k4 - 1u);
                var mine: array<vec4<f32>, LOADS>;
                for (var l = 0u; l < LOADS; l++) {
                    mine[l] = x[x_at[l] + k];
                }
                var wide: array<array<vec4<f32>, 4>, COLUMNS>;
                for (var c = 0u; c < COLUMNS; c++) {
                    for (var j = 0u; j < 4u; j++) {
                        wide[c][j] = widen(stored[c][j], i);
                        @if(q8 || q4) wide[c][j] *= scales[c][j];
                    }
                }
                for (var r = 0u; r < TILE_ROWS; r++) {
                    @if(subgroup) let row = subgroupShuffle(mine[r / 8u], r % 8u);
                    @else let row = mine[r];
                    for (var c = 0u; c < COLUMNS; c++) {
                        let sum = (*sums)[c][r];
                        (*sums)[c][r] = accumulate(sum, row, wide[c][0], wide[c][1], wide[c][2], wide[c][3]);
                    }
                }
            }
        }
    }
}

// The product that matrix kernels make of matrices whose weights share scales where numerics are fast: 32 columns of a row
// of x are rounded to bytes with a scale of their own, and bytes are multiplied four at a time, or one by one as f32
// (`floats`): both ways the sum of a block is exact, whatever its order, as it is below 2^24. Blocks are added k ascending,
// one fma each, from 0, in every variant. A row is rounded by itself.
import package::shared::tile::{COLUMNS, LOADS, PARTS, PerColumn, Starts, Sums, TILE_ROWS, accumulate};
import package::shared::weight::{BLOCK4, BYTE_SCALE, UNIT4, Unit, bytes_of, scale_of};
import package::shared::matrix::unit_at; // binding 2

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;

// Words of a block of a row that a lane has: all, or what is its part where lanes hand each other rows.
const WORDS: u32 = BLOCK4 / PARTS;

// Four columns, as bytes or as what those are.
@if(floats) alias Word = vec4<f32>;
@else alias Word = u32;

// Four sums of a block.
@if(floats) alias Dots = vec4<f32>;
@else alias Dots = vec4<i32>;

// A lane's part of 32 columns of a row, and what 1 of them stands for.
struct Rounded {
    words: array<Word, WORDS>,
    scale: f32,
}

struct Held {
    rows: array<Rounded, LOADS>,
    units: array<array<Unit, 4>, COLUMNS>,
    scales: array<vec4<f32>, COLUMNS>,
    dots: array<array<Dots, TILE_ROWS>, COLUMNS>,
}

// Where a lane's columns begin in w, and how far their units are from each other.
struct Matrix {
    columns: PerColumn,
    steps: PerColumn,
}

// What takes values of at most this size (the bits of a positive f32) to 127 at most. It has nine bits, and is so far from
// where they end that it comes out the same however a device divides. 0: there is nothing to round, or no number.
fn factor_of(largest: u32) -> f32 {
    let exponent = largest >> 23u;
    let above = f32(((largest >> 15u) & 0xffu) + 257u); // in 256ths of 2^exponent
    let factor = floor(130048.0 / above + 0.0005) * bitcast<f32>((252u - min(exponent, 251u)) << 23u);
    return select(0.0, factor, exponent > 27u && exponent < 252u);
}

// The vec4s `block + part`, `+ PARTS`, .. of the row that begins at `start`.
fn rounded(start: u32, block: u32, part: u32, k4: u32) -> Rounded {
    var values: array<vec4<f32>, WORDS>;
    var largest = 0u;
    for (var i = 0u; i < WORDS; i++) {
        // Weights beyond the row's end are 0: its last values, which are of this block, stand for those of x there.
        values[i] = x[start + min(block + i * PARTS + part, k4 - 1u)];
        let sizes = bitcast<vec4<u32>>(values[i]) & vec4<u32>(0x7fffffffu);
        largest = max(largest, max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)));
    }
    // The other parts are as many lanes away as rows share eight lanes.
    @if(subgroup && one) largest = max(largest, subgroupShuffleXor(largest, 1u));
    @if(subgroup && (one || tile2)) largest = max(largest, subgroupShuffleXor(largest, 2u));
    @if(subgroup && (one || tile2 || tile4)) largest = max(largest, subgroupShuffleXor(largest, 4u));
    let factor = factor_of(largest);
    var row: Rounded;
    for (var i = 0u; i < WORDS; i++) {
        @if(floats) row.words[i] = round(values[i] * factor);
        @else row.words[i] = pack4xI8(vec4<i32>(round(values[i] * factor)));
    }
    // Next to nothing counts as nothing; what is no number stays none.
    row.scale = select(bitcast<f32>(largest), 1.0 / factor, factor > 0.0);
    return row;
}

// Word `i` of the block at `k`; `i` is a constant.
fn add_word(held: ptr<function, Held>, matrix: Matrix, k: u32, i: u32) {
    if i % UNIT4 == 0u {
        var lane = matrix;
        let unit = (k + i) / UNIT4;
        for (var j = 0u; j < 4u; j++) {
            for (var c = 0u; c < COLUMNS; c++) {
                (*held).units[c][j] = unit_at(lane.columns[c] + (4u * unit + j) * lane.steps[c]);
            }
        }
    }
    var weights: array<array<Word, 4>, COLUMNS>;
    for (var c = 0u; c < COLUMNS; c++) {
        for (var j = 0u; j < 4u; j++) {
            let bytes = bytes_of((*held).units[c][j], i % UNIT4);
            @if(floats) weights[c][j] = vec4<f32>(unpack4xI8(bytes));
            @else weights[c][j] = bytes;
        }
    }
    for (var r = 0u; r < TILE_ROWS; r++) {
        let from_lane = i % PARTS * TILE_ROWS + r;
        @if(subgroup) let word = subgroupShuffle((*held).rows[from_lane / 8u].words[i / PARTS], from_lane % 8u);
        @else let word = (*held).rows[r].words[i];
        for (var c = 0u; c < COLUMNS; c++) {
            let by = weights[c];
            let before = (*held).dots[c][r];
            @if(floats) {
                (*held).dots[c][r] = accumulate(before, word, by[0], by[1], by[2], by[3]);
            }
            @else {
                (*held).dots[c][r] = before + vec4<i32>(
                    dot4I8Packed(word, by[0]),
                    dot4I8Packed(word, by[1]),
                    dot4I8Packed(word, by[2]),
                    dot4I8Packed(word, by[3]),
                );
            }
        }
    }
}

// The block at `k` of a lane's rows and columns.
fn add_block(sums: ptr<function, Sums>, held: ptr<function, Held>, starts: Starts, matrix: Matrix, k: u32, k4: u32, part: u32) {
    var lane_starts = starts;
    for (var l = 0u; l < LOADS; l++) {
        (*held).rows[l] = rounded(lane_starts[l], k, part, k4);
    }
    for (var c = 0u; c < COLUMNS; c++) {
        for (var r = 0u; r < TILE_ROWS; r++) {
            (*held).dots[c][r] = Dots(0);
        }
    }
    // Written out, as a turn of `product.wgsl` is.
    add_word(held, matrix, k, 0u);
    add_word(held, matrix, k, 1u);
    add_word(held, matrix, k, 2u);
    add_word(held, matrix, k, 3u);
    add_word(held, matrix, k, 4u);
    add_word(held, matrix, k, 5u);
    add_word(held, matrix, k, 6u);
    add_word(held, matrix, k, 7u);
    for (var r = 0u; r < TILE_ROWS; r++) {
        @if(subgroup) let scale = subgroupShuffle((*held).rows[r / 8u].scale, r % 8u);
        @else let scale = (*held).rows[r].scale;
        for (var c = 0u; c < COLUMNS; c++) {
            (*sums)[c][r] = fma(vec4<f32>((*held).dots[c][r]), (*held).scales[c] * scale, (*sums)[c][r]);
        }
    }
}

// As in `product.wgsl`.
fn product(
    sums: ptr<function, Sums>,
    starts: Starts,
    columns: PerColumn,
    steps: PerColumn,
    units: u32,
    k4: u32,
    lane: u32,
) {
    var matrix = Matrix(columns, steps);
    let part = lane % 8u / TILE_ROWS % PARTS;
    var held: Held;
    let end = units * UNIT4;
    // Loops are left at their ends (`product.wgsl` says why).
    var k = 0u;
    loop {
        // One unit holds the scales of eight blocks.
        var eight: array<array<Unit, 4>, COLUMNS>;
        let unit = units + k / (8u * BLOCK4);
        for (var j = 0u; j < 4u; j++) {
            for (var c = 0u; c < COLUMNS; c++) {
                eight[c][j] = unit_at(matrix.columns[c] + (4u * unit + j) * matrix.steps[c]);
            }
        }
        let last = min(k + 8u * BLOCK4, end);
        loop {
            let block = k / BLOCK4;
            for (var c = 0u; c < COLUMNS; c++) {
                held.scales[c] = BYTE_SCALE * vec4<f32>(
                    scale_of(eight[c][0], block),
                    scale_of(eight[c][1], block),
                    scale_of(eight[c][2], block),
                    scale_of(eight[c][3], block),
                );
            }
            add_block(sums, &held, starts, matrix, k, k4, part);
            k += BLOCK4;
            if k >= last {
                break;
            }
        }
        if k >= end {
            break;
        }
    }
}

// All rows of a tile are worked on: they are dear to round, not to multiply.
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
    product(sums, starts, columns, steps, units, k4, lane);
}

// The product that matrix kernels make on an adapter's matrix units where numerics are fast: of TILE_ROWS rows of x and two
// blocks of 32 columns for each workgroup. Both are brought into workgroup memory as f16, 32 of k at a time, whatever form the
// weights lie in, those that share scales as what they stand for; products are added in f32, k ascending in steps of SIDE. A row is scaled by a power of two, by its own largest
// value alone, so that f16 holds all of it. So a row has the same bits in a batch of any size, if the units add alike for all
// rows of a matrix, which is tried before they are used.
import package::shared::tile::TILE_ROWS;
import package::shared::weight::{BLOCK4, UNIT4, Unit, column_start, column_step, scale_of, widen};
import package::shared::matrix::unit_at; // binding 2
enable f16;
enable wgpu_cooperative_matrix;

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;

// Rows and columns of the matrices that are multiplied.
@if(coop16) const SIDE: u32 = 16u;
@else const SIDE: u32 = 8u;
@if(coop16) alias Left = coop_mat16x16<f16, A>;
@else alias Left = coop_mat8x8<f16, A>;
@if(coop16) alias Right = coop_mat16x16<f16, B>;
@else alias Right = coop_mat8x8<f16, B>;
@if(coop16) alias Sum = coop_mat16x16<f32, C>;
@else alias Sum = coop_mat8x8<f32, C>;

const BLOCKS: u32 = 2u;
const BLOCK: u32 = 4u * BLOCK4;
const TILE_COLUMNS: u32 = BLOCKS * BLOCK;
const TILE_COLUMNS4: u32 = TILE_COLUMNS / 4u;

// Subgroups of a workgroup; where it has more of them, as they are smaller than they may be, the further ones make the same as
// the first ones do: only all lanes together may multiply. Each makes HIGH * WIDE matrices of sums, one of ROW_PARTS parts of the rows and COLUMN_PARTS of the columns.
const SUBGROUPS: u32 = 4u;
const HIGH: u32 = min(TILE_ROWS / SIDE, 2u);
const ROW_PARTS: u32 = TILE_ROWS / (SIDE * HIGH);
const COLUMN_PARTS: u32 = SUBGROUPS / ROW_PARTS;
const WIDE: u32 = TILE_COLUMNS / (SIDE * COLUMN_PARTS);

// Halves from a row of a tile to the next: eight more than it has, so that rows do not share banks.
const STRIDE: u32 = BLOCK + 8u;

var<workgroup> starts: array<u32, TILE_ROWS>;                     // vec4s of x at which rows begin
var<workgroup> factors: array<f32, TILE_ROWS>;                    // what they are scaled by
var<workgroup> x_tile: array<f16, TILE_ROWS * STRIDE>;            // [TILE_ROWS, 32 of k]
var<workgroup> w_tile: array<f16, TILE_COLUMNS * STRIDE>;         // [TILE_COLUMNS, 32 of k]
var<workgroup> products: array<f32, TILE_ROWS * TILE_COLUMNS>;    // [TILE_ROWS, TILE_COLUMNS]

// A lane among those of its workgroup.
struct Lane {
    index: u32,
    count: u32,
    subgroup: u32,
    subgroups: u32,
    within: u32, // its subgroup
    width: u32,  // of its subgroup
}

// A block of columns of w: its first unit, and how many vec4s of columns it has.
struct Block {
    start: u32,
    step: u32,
}

// The block at vec4 `column` of columns of a matrix that begins at unit `matrix`; beyond its last one there are no columns.
fn block_at(matrix: u32, column: u32, stride: u32, n4: u32) -> Block {
    if column >= n4 {
        return Block(matrix, 0u);
    }
    return Block(matrix + column_start(column, stride), column_step(column, n4));
}

// The power of two that takes values of at most this size (the bits of a positive f32) to between 2^14 and 2^15.
fn factor_of(largest: u32) -> f32 {
    return bitcast<f32>(clamp(268u - min(largest >> 23u, 254u), 1u, 253u) << 23u);
}

// Finds the factors of all rows: a row for a subgroup at a time.
fn scale_rows(lane: Lane, k4: u32) {
    for (var row = lane.subgroup; row < TILE_ROWS; row += lane.subgroups) {
        var largest = 0u;
        for (var k = lane.within; k < k4; k += lane.width) {
            let sizes = bitcast<vec4<u32>>(x[starts[row] + k]) & vec4<u32>(0x7fffffffu);
            largest = max(largest, max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)));
        }
        largest = subgroupMax(largest);
        if lane.within == 0u {
            factors[row] = factor_of(largest);
        }
    }
}

// Four values in f16; weights beyond what that holds are as large as it is.
fn halves(values: vec4<f32>) -> vec4<f16> {
    return vec4<f16>(clamp(values, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
}

fn load_rows(lane: Lane, k: u32, k4: u32) {
    for (var i = lane.index; i < TILE_ROWS * BLOCK4; i += lane.count) {
        let row = i / BLOCK4;
        var values = vec4<f32>(0.0);
        if k + i % BLOCK4 < k4 {
            values = x[starts[row] + k + i % BLOCK4] * factors[row];
        }
        let four = vec4<f16>(values);
        let to = row * STRIDE + 4u * (i % BLOCK4);
        x_tile[to] = four.x;
        x_tile[to + 1u] = four.y;
        x_tile[to + 2u] = four.z;
        x_tile[to + 3u] = four.w;
    }
}

// Lanes that follow each other load units that do.
fn load_columns(lane: Lane, blocks: array<Block, BLOCKS>, units: u32, k: u32) {
    var both = blocks;
    const UNITS: u32 = BLOCK4 / UNIT4;
    for (var i = lane.index; i < TILE_COLUMNS * UNITS; i += lane.count) {
        let block = both[i / (BLOCK * UNITS)];
        let unit = i / BLOCK % UNITS;
        let j = i / 8u % 4u;
        let column = i % 8u;
        if column >= block.step {
            continue;
        }
        let loaded = unit_at(block.start + (4u * (k / UNIT4 + unit) + j) * block.step + column);
        // One unit behind the weights holds the scales of eight blocks.
        @if(q8 || q4 || mx4) let scales = unit_at(block.start + (4u * (units + k / (8u * BLOCK4)) + j) * block.step + column);
        @if(q8 || q4 || mx4) let scale = scale_of(scales, k / BLOCK4);
        let to = (i / (BLOCK * UNITS) * BLOCK + 4u * column + j) * STRIDE + 4u * unit * UNIT4;
        for (var part = 0u; part < UNIT4; part++) {
            @if(q8 || q4 || mx4) let four = halves(widen(loaded, part) * scale);
            @else let four = halves(widen(loaded, part));
            w_tile[to + 4u * part] = four.x;
            w_tile[to + 4u * part + 1u] = four.y;
            w_tile[to + 4u * part + 2u] = four.z;
            w_tile[to + 4u * part + 3u] = four.w;
        }
    }
}

// Multiplies the rows that `starts` names by the columns of `blocks`, for `product_at` to tell. The first `units` of a row of w
// hold the weights of 4 * k4 columns of x and zeros up to whole blocks.
fn product(lane: Lane, blocks: array<Block, BLOCKS>, units: u32, k4: u32) {
    workgroupBarrier();
    scale_rows(lane, k4);
    workgroupBarrier();
    let row = lane.subgroup % SUBGROUPS / COLUMN_PARTS * HIGH * SIDE;
    let column = lane.subgroup % COLUMN_PARTS * WIDE * SIDE;
    var sums: array<array<Sum, WIDE>, HIGH>;
    for (var k = 0u; k < units * UNIT4; k += BLOCK4) {
        load_rows(lane, k, k4);
        load_columns(lane, blocks, units, k);
        workgroupBarrier();
        for (var at = 0u; at < BLOCK; at += SIDE) {
            for (var c = 0u; c < WIDE; c++) {
                let right = coopLoad<Right>(&w_tile[(column + c * SIDE) * STRIDE + at], STRIDE);
                for (var r = 0u; r < HIGH; r++) {
                    let left = coopLoadT<Left>(&x_tile[(row + r * SIDE) * STRIDE + at], STRIDE);
                    sums[r][c] = coopMultiplyAdd(left, right, sums[r][c]);
                }
            }
        }
        workgroupBarrier();
    }
    for (var c = 0u; c < WIDE; c++) {
        for (var r = 0u; r < HIGH; r++) {
            let to = (row + r * SIDE) * TILE_COLUMNS + column + c * SIDE;
            coopStoreT(sums[r][c], &products[to], TILE_COLUMNS);
        }
    }
    workgroupBarrier();
}

// Of the tile's row `row`, vec4 `column` of the tile's columns.
fn product_at(row: u32, column: u32) -> vec4<f32> {
    let at = row * TILE_COLUMNS + 4u * column;
    let back = bitcast<f32>((254u << 23u) - bitcast<u32>(factors[row]));
    return vec4<f32>(products[at], products[at + 1u], products[at + 2u], products[at + 3u]) * back;
}

// What one lane of a matrix kernel makes: TILE_ROWS rows of COLUMNS vec4s of columns. Every sum is formed in the same
// order whatever the tile, so that a row has the same bits in a batch of any size. On matrix units (`cooperative.wgsl`) TILE_ROWS
// are those of a workgroup, 8 to 64 of them; expert lists are cut by either.
@if(tile2) const TILE_ROWS: u32 = 2u;
@elif(tile4) const TILE_ROWS: u32 = 4u;
@elif(tile8) const TILE_ROWS: u32 = 8u;
@elif(tile16) const TILE_ROWS: u32 = 16u;
@elif(tile32) const TILE_ROWS: u32 = 32u;
@elif(tile64) const TILE_ROWS: u32 = 64u;
@else const TILE_ROWS: u32 = 1u;
@if(three) const COLUMNS: u32 = 3u;
@else const COLUMNS: u32 = 2u;

// vec4s of a row that lanes load at once where they hand each other what they loaded: eight lanes share up to eight
// rows, and the parts of fewer.
@if(subgroup && one) const PARTS: u32 = 8u;
@elif(subgroup && tile2) const PARTS: u32 = 4u;
@elif(subgroup && tile4) const PARTS: u32 = 2u;
@else const PARTS: u32 = 1u;

// Rows of x that a lane loads itself.
@if(subgroup && tile16) const LOADS: u32 = 2u;
@elif(subgroup) const LOADS: u32 = 1u;
@else const LOADS: u32 = TILE_ROWS;

// The i-th row that a lane loads where `rows` of a tile are worked on. Subgroups have at least eight lanes, and lanes follow each
// other in them.
fn row_of(i: u32, lane: u32, rows: u32) -> u32 {
    @if(subgroup) return 8u * i + (lane & min(rows - 1u, 7u));
    @else return i;
}

// How many rows of a tile are worked on where its first `count` are there: all of them, half or a quarter.
fn worked_on(count: u32) -> u32 {
    @if(one || dot) return TILE_ROWS;
    @else return select(select(TILE_ROWS / 4u, TILE_ROWS / 2u, 4u * count > TILE_ROWS), TILE_ROWS, 2u * count > TILE_ROWS);
}

alias Sums = array<array<vec4<f32>, TILE_ROWS>, COLUMNS>;
alias Starts = array<u32, LOADS>;
alias PerColumn = array<u32, COLUMNS>;

// acc + x . w_j for four output columns j, one element of k after another: the stated order of every matrix
// product in this folder is k ascending, one fma each, from 0.
fn accumulate(acc: vec4<f32>, x: vec4<f32>, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>) -> vec4<f32> {
    var sum = fma(vec4<f32>(x.x), vec4<f32>(w0.x, w1.x, w2.x, w3.x), acc);
    sum = fma(vec4<f32>(x.y), vec4<f32>(w0.y, w1.y, w2.y, w3.y), sum);
    sum = fma(vec4<f32>(x.z), vec4<f32>(w0.z, w1.z, w2.z, w3.z), sum);
    return fma(vec4<f32>(x.w), vec4<f32>(w0.w, w1.w, w2.w, w3.w), sum);
}

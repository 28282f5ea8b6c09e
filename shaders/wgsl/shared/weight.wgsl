// Weights as they lie on the device. A row of a matrix is padded with zeros to blocks of 32 weights and cut into units
// of 16 bytes: 4 weights in f32, 8 in f16, 16 in q8_0, 32 in q4_0. Behind the weights of a quantised row stand units of
// its scales, an f16 for every block. Rows stand in blocks of 32 (eight vec4s of output columns), within a block unit by
// unit: the first of the rows 0, 4, 8, .. 28, then of the rows 1, 5, .. 29, and so on, so that eight lanes, which make
// four columns each, read 128 bytes that follow each other. The last block of a matrix may be narrower. Arithmetic is
// f32 in every case, on the number that a weight stands for.
@if(half || q8 || q4) alias Unit = vec4<u32>;
@else alias Unit = vec4<f32>;

// vec4s of weights in a unit.
@if(half) const UNIT4: u32 = 2u;
@elif(q8) const UNIT4: u32 = 4u;
@elif(q4) const UNIT4: u32 = 8u;
@else const UNIT4: u32 = 1u;

// vec4s of weights in a block.
const BLOCK4: u32 = 8u;

// Of vec4 `column` of columns of a matrix: where its first row begins, and how far its units are from each other.
fn column_start(column: u32, stride: u32) -> u32 {
    return column / 8u * 32u * stride + column % 8u;
}

fn column_step(column: u32, n4: u32) -> u32 {
    return min(8u, n4 - column / 8u * 8u);
}

// Weights 4i .. 4i + 3 of a unit, before they are scaled. In q4_0 the low halves of a word's bytes come first.
fn widen(unit: Unit, i: u32) -> vec4<f32> {
    @if(half) return vec4<f32>(unpack2x16float(unit[2u * i]), unpack2x16float(unit[2u * i + 1u]));
    @elif(q8) return vec4<f32>(unpack4xI8(unit[i]));
    @elif(q4) return vec4<f32>(unpack4xU8((unit[i / 2u] >> (4u * (i % 2u))) & 0x0f0f0f0fu)) - vec4<f32>(8.0);
    @else return unit;
}

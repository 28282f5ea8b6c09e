// Weights as they lie on the device. A row of a matrix is padded with zeros to blocks of 32 weights and cut into units
// of 16 bytes: 4 weights in f32, 8 in f16, 16 in q8_0, 32 in q4_0 and MXFP4. Behind the weights of a quantised row stand
// units of its scales, 16 bits for every block: an f16, or of MXFP4, whose scales are powers of two, a bf16. Rows stand in blocks of 32 (eight vec4s of output columns), within a block unit by
// unit: the first of the rows 0, 4, 8, .. 28, then of the rows 1, 5, .. 29, and so on, so that eight lanes, which make
// four columns each, read 128 bytes that follow each other. The last block of a matrix may be narrower. Arithmetic is
// f32 in every case, on the number that a weight stands for.
@if(half || q8 || q4 || mx4) alias Unit = vec4<u32>;
@else alias Unit = vec4<f32>;

// vec4s of weights in a unit.
@if(half) const UNIT4: u32 = 2u;
@elif(q8) const UNIT4: u32 = 4u;
@elif(q4 || mx4) const UNIT4: u32 = 8u;
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

// The scale of a block in a unit of eight of them.
@if(q8 || q4) fn scale_of(scales: Unit, block: u32) -> f32 {
    return unpack2x16float(scales[block / 2u % 4u])[block % 2u];
}
@if(mx4) fn scale_of(scales: Unit, block: u32) -> f32 {
    return bitcast<f32>((scales[block / 2u % 4u] >> (16u * (block % 2u))) << 16u);
}
@if(!q8 && !q4 && !mx4) fn scale_of(scales: Unit, block: u32) -> f32 {
    return 1.0;
}

// Weights 4i .. 4i + 3 of a unit, before they are scaled. In q4_0 and MXFP4 the low halves of a word's bytes come first.
fn widen(unit: Unit, i: u32) -> vec4<f32> {
    @if(half) return vec4<f32>(unpack2x16float(unit[2u * i]), unpack2x16float(unit[2u * i + 1u]));
    @elif(q8) return vec4<f32>(unpack4xI8(unit[i]));
    @elif(q4) return vec4<f32>(unpack4xU8(nibbles_of(unit, i))) - vec4<f32>(8.0);
    @elif(mx4) return (vec4<f32>(unpack4xU8(halves_of(unit, i))) - vec4<f32>(16.0)) * 0.5;
    @else return unit;
}

@if(q4) fn nibbles_of(unit: Unit, i: u32) -> u32 {
    return (unit[i / 2u] >> (4u * (i % 2u))) & 0x0f0f0f0fu;
}

// Four numbers of MXFP4 in halves, each 16 more in a byte: the low three bits say 0, 1, 2, 3, 4, 6, 8 or 12 halves, which
// is themselves and, from 4 on, 0, 1, 2 or 5 more.
@if(mx4) fn halves_of(unit: Unit, i: u32) -> u32 {
    let nibbles = unit[i / 2u] >> (4u * (i % 2u));
    let ones = 0x01010101u;
    let low = nibbles & ones;
    let high = (nibbles >> 2u) & ones;
    let both = (nibbles >> 1u) & high;
    let sizes = (nibbles & 0x07070707u) + (high & low) + 2u * (both + (both & low));
    let minus = ((nibbles >> 3u) & ones) * 255u;
    return 0x10101010u + sizes - 2u * (sizes & minus);
}

// The same weights as four signed bytes, and what 1 of them stands for before it is scaled.
@if(q8) fn bytes_of(unit: Unit, i: u32) -> u32 {
    return unit[i];
}
// No byte borrows from the next with its highest bit set, which is then what the sign is not.
@if(q4) fn bytes_of(unit: Unit, i: u32) -> u32 {
    return ((nibbles_of(unit, i) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}
@if(mx4) fn bytes_of(unit: Unit, i: u32) -> u32 {
    return ((halves_of(unit, i) | 0x80808080u) - 0x10101010u) ^ 0x80808080u;
}
@if(mx4) const BYTE_SCALE: f32 = 0.5;
@else const BYTE_SCALE: f32 = 1.0;

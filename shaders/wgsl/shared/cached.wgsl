// Keys and values as the cache holds them: f32, f16 in pairs, or 8 bits, of which 32 columns share a scale. A row's
// scales, f32 words with eight bits of mantissa, stand behind its values. Rounding what was rounded changes nothing.
// The cache is a buffer, or (`image`) a texture, as matrices are (`shared/matrix.wgsl`).
@if(kv16) alias Cached = vec2<u32>;
@elif(kv8) alias Cached = u32;
@else alias Cached = vec4<f32>;

// Elements of the cache from a row of `width4` vec4s to the next. Where that were a multiple of 1 KiB, 64 bytes are left free
// behind each: the same column of many rows would share a few lines of a CPU's cache.
fn cached_stride(width4: u32) -> u32 {
    @if(kv8) let elements = width4 + (width4 + 7u) / 8u;
    @else let elements = width4;
    return elements + select(0u, LINE, elements % (16u * LINE) == 0u);
}

// Rows of a block.
const ROWS: u32 = 16u;

// Where the row of a slot begins. Rows of `width4` vec4s lie in blocks of 16, part by part of `part4` elements: the first part of all
// rows of a block, then the second, and so on, so that a head reads what lies together. A part of `cached_stride` elements is a whole row.
fn cached_row(slot: u32, width4: u32, part4: u32) -> u32 {
    return slot / ROWS * ROWS * cached_stride(width4) + slot % ROWS * part4;
}

// How far behind that its element `column` is.
fn cached_column(column: u32, part4: u32) -> u32 {
    return column / part4 * ROWS * part4 + column % part4;
}

// Elements in 64 bytes.
@if(kv16) const LINE: u32 = 8u;
@elif(kv8) const LINE: u32 = 16u;
@else const LINE: u32 = 4u;

// Four values as the cache holds them.
@if(kv16) fn narrowed(value: vec4<f32>) -> Cached {
    return vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw));
}
@if(!kv16 && !kv8) fn narrowed(value: vec4<f32>) -> Cached {
    return value;
}

// The scale of columns of which `largest` is the largest size: to the nearest number of eight bits, so that 127 steps
// of it are exact.
fn step_of(largest: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(largest / 127.0) + 0x8000u) & 0xffff0000u);
}

// Four values in 8 bits.
fn steps(value: vec4<f32>, step: f32) -> u32 {
    let whole = select(vec4<f32>(0.0), round(value / step), vec4<bool>(step > 0.0));
    return pack4xI8(vec4<i32>(clamp(whole, vec4<f32>(-127.0), vec4<f32>(127.0))));
}

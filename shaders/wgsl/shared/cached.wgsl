// Keys and values as the cache holds them: f32, f16 in pairs, or 8 bits, of which 32 columns share a scale. A row's
// scales, f32 words with eight bits of mantissa, stand behind its values. Rounding what was rounded changes nothing.
// The cache is a buffer, or (`image`) a texture whose rows hold 2^14 of them, as matrices are (`shared/matrix.wgsl`).
@if(kv16) alias Cached = vec2<u32>;
@elif(kv8) alias Cached = u32;
@else alias Cached = vec4<f32>;

// Elements of the cache in a row of `width4` vec4s.
fn cached_stride(width4: u32) -> u32 {
    @if(kv8) return width4 + (width4 + 7u) / 8u;
    @else return width4;
}

// Where element `i` of the cache is in a texture.
fn cached_texel(i: u32) -> vec2<u32> {
    return vec2<u32>(i & 0x3fffu, i >> 14u);
}

// Keys and values as the cache holds them: f32, f16 in pairs, or 8 bits, of which 32 columns share a scale. A row's
// scales, f32 words with eight bits of mantissa, stand behind its values. Rounding what was rounded changes nothing.
@if(kv16) alias Cached = vec2<u32>;
@elif(kv8) alias Cached = u32;
@else alias Cached = vec4<f32>;

// Elements of the cache in a row of `width4` vec4s.
fn cached_stride(width4: u32) -> u32 {
    @if(kv8) return width4 + (width4 + 7u) / 8u;
    @else return width4;
}

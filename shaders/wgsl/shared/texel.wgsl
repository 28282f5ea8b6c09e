// Where element `i` of a list is in a texture that holds it: rows of 2^14 texels (`IMAGE_WIDTH` in `shaders/src/variant.rs`).
fn texel_of(i: u32) -> vec2<u32> {
    return vec2<u32>(i & 0x3fffu, i >> 14u);
}

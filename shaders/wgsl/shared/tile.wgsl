// How many rows a lane works on at once. Every row's sum is formed in the same order whatever the tile,
// so that a row has the same bits in a batch of any size.
@if(tile8) const TILE_ROWS: u32 = 8u;
@else const TILE_ROWS: u32 = 1u;

// acc + x . w_j for four output columns j, one element of k after another: the stated order of every matrix
// product in this folder is k ascending, one fma each, from 0.
fn accumulate(acc: vec4<f32>, x: vec4<f32>, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>) -> vec4<f32> {
    var sum = fma(vec4<f32>(x.x), vec4<f32>(w0.x, w1.x, w2.x, w3.x), acc);
    sum = fma(vec4<f32>(x.y), vec4<f32>(w0.y, w1.y, w2.y, w3.y), sum);
    sum = fma(vec4<f32>(x.z), vec4<f32>(w0.z, w1.z, w2.z, w3.z), sum);
    return fma(vec4<f32>(x.w), vec4<f32>(w0.w, w1.w, w2.w, w3.w), sum);
}

// What an adapter's arithmetic allows, apart from its memory: out[i] = the sum of 16 vec4s after `rounds` fused
// multiply-adds of each (or, with `q8`, products of four bytes each).
struct Params {
    rounds: u32,
    factor: f32, // of every multiply-add
    bytes: u32,  // four factors in one word
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>; // [lanes]

override WORKGROUP: u32 = 32u;
const CHAINS: u32 = 16u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    @if(q8) var chains: array<vec4<i32>, CHAINS>;
    @else var chains: array<vec4<f32>, CHAINS>;
    for (var c = 0u; c < CHAINS; c++) {
        @if(q8) chains[c] = vec4<i32>(i32(id.x % 64u + c));
        @else chains[c] = vec4<f32>(f32(id.x % 64u + c));
    }
    for (var round = 0u; round < p.rounds; round++) {
        for (var c = 0u; c < CHAINS; c++) {
            @if(q8) {
                let before = chains[c];
                chains[c] = vec4<i32>(
                    dot4I8Packed(u32(before.x), p.bytes),
                    dot4I8Packed(u32(before.y), p.bytes),
                    dot4I8Packed(u32(before.z), p.bytes),
                    dot4I8Packed(u32(before.w), p.bytes),
                );
            }
            @else {
                chains[c] = fma(chains[c], vec4<f32>(p.factor), vec4<f32>(1.0));
            }
        }
    }
    var sum = vec4<f32>(0.0);
    for (var c = 0u; c < CHAINS; c++) {
        sum += vec4<f32>(chains[c]);
    }
    out[id.x] = sum;
}

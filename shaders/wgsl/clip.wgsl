// Clamps whole rows in place, on both sides: queries, keys and values of models that clip them.
struct Params {
    width4: u32,  // of a row
    limit: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>; // [T, width4]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.width4 {
        let at = id.y * p.width4 + id.x;
        x[at] = clamp(x[at], vec4<f32>(-p.limit), vec4<f32>(p.limit));
    }
}

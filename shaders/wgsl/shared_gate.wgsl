// weight of pair[first + i] = sigmoid(x[row] . w): how much of its shared expert a token takes.
import package::shared::pair::Pair;

struct Params {
    h4: u32,     // H / 4
    first: u32,  // of the pairs
    count: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;      // [.., H/4] normed rows
@group(0) @binding(2) var<storage, read> w: array<vec4<f32>>;      // [H/4]
@group(0) @binding(3) var<storage, read_write> pairs: array<Pair>;

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.count {
        return;
    }
    let row = pairs[p.first + id.x].row * p.h4;
    var sum = vec4<f32>(0.0);
    for (var k = 0u; k < p.h4; k++) {
        sum = fma(x[row + k], w[k], sum);
    }
    let value = (sum.x + sum.y) + (sum.z + sum.w);
    pairs[p.first + id.x].weight = 1.0 / (1.0 + exp(-value));
}

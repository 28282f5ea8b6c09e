// Where a kernel's matrix is: in a buffer, or (`image`) in a texture. lavapipe loads a texel
// for eight lanes in a fifth of the time that it takes for 16 bytes of a buffer.
import package::shared::weight::Unit;
import package::shared::texel::texel_of;

@if(image) @group(0) @binding(2) var w: texture_storage_2d<rgba32uint, read>;
@else @group(0) @binding(2) var<storage, read> w: array<Unit>;

fn unit_at(i: u32) -> Unit {
    @if(image && (half || q8 || q4 || mx4)) return textureLoad(w, texel_of(i));
    @elif(image) return bitcast<vec4<f32>>(textureLoad(w, texel_of(i)));
    @else return w[i];
}

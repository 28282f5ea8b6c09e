// Four weights of a row as they lie in a buffer: f32, or f16 in pairs. Arithmetic is f32 in either case.
@if(half) alias Weights = vec2<u32>;
@else alias Weights = vec4<f32>;

fn widen(w: Weights) -> vec4<f32> {
    @if(half) return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
    @else return w;
}

// Writes keys and values of some rows into the paged cache, rounded to its type: cache[slot[t]] = source[t, offset ..].
import package::shared::cached::{Cached, cached_stride, cached_texel};

struct Params {
    rows: u32,     // T
    width4: u32,   // of a cache row: keys, then values, of every key head
    stride4: u32,  // of a source row
    offset4: u32,  // of the keys within it
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<f32>>;      // [T, stride/4]
@group(0) @binding(2) var<storage, read> slots: array<u32>;             // [T] position within the cache
// [slots, cached_stride]
@if(image && kv16) @group(0) @binding(3) var cache: texture_storage_2d<rg32uint, write>;
@elif(image && kv8) @group(0) @binding(3) var cache: texture_storage_2d<r32uint, write>;
@elif(image) @group(0) @binding(3) var cache: texture_storage_2d<rgba32uint, write>;
@else @group(0) @binding(3) var<storage, read_write> cache: array<Cached>;

override WORKGROUP: u32 = 32u;

fn put(i: u32, value: Cached) {
    @if(image && kv16) textureStore(cache, cached_texel(i), vec4<u32>(value, 0u, 0u));
    @elif(image && kv8) textureStore(cache, cached_texel(i), vec4<u32>(value));
    @elif(image) textureStore(cache, cached_texel(i), bitcast<vec4<u32>>(value));
    @else cache[i] = value;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.y;
    if column >= p.width4 || row >= p.rows {
        return;
    }
    let to = slots[row] * cached_stride(p.width4);
    let base = row * p.stride4 + p.offset4;
    let value = source[base + column];
    @if(kv16) {
        put(to + column, vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw)));
    }
    @elif(kv8) {
        let block = column / 8u;
        var largest = 0.0;
        for (var c = 8u * block; c < min(8u * block + 8u, p.width4); c++) {
            let size = abs(source[base + c]);
            largest = max(largest, max(max(size.x, size.y), max(size.z, size.w)));
        }
        // To the nearest number of eight bits, so that 127 steps of it are exact.
        let scale = bitcast<f32>((bitcast<u32>(largest / 127.0) + 0x8000u) & 0xffff0000u);
        let steps = select(vec4<f32>(0.0), round(value / scale), vec4<bool>(scale > 0.0));
        put(to + column, pack4xI8(vec4<i32>(clamp(steps, vec4<f32>(-127.0), vec4<f32>(127.0)))));
        if column % 8u == 0u {
            put(to + p.width4 + block, bitcast<u32>(scale));
        }
    }
    @else {
        put(to + column, value);
    }
}

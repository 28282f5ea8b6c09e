// The mean and the scale of a row of the residual stream that is to be normed. Sums have one order, whatever the lanes: the row
// is cut into 32 stretches, of which stretch s has the vec4s s, s + 32, s + 64, ..; each is summed by itself, then the
// stretches one after another. 32 lanes have one stretch each and meet in workgroup memory; eight lanes that hand each
// other values (`subgroup`) have four each.
@if(subgroup) const LANES: u32 = 8u;
@else const LANES: u32 = 32u;
const STRETCHES: u32 = 32u;
const PER_LANE: u32 = STRETCHES / LANES;

@group(0) @binding(7) var<storage, read_write> x: array<vec4<f32>>; // [.., H/4] residual stream

alias Stretches = array<f32, PER_LANE>;

@if(!subgroup) var<workgroup> stretches: array<f32, 32>;

// The sum of all stretches. Lane l has the stretches l, l + LANES, ..
fn total(lane: u32, mine: Stretches) -> f32 {
    var sum = 0.0;
    @if(subgroup) {
        for (var j = 0u; j < PER_LANE; j++) {
            let stretch = mine[j];
            for (var i = 0u; i < LANES; i++) {
                sum += subgroupShuffle(stretch, i);
            }
        }
    }
    @else {
        stretches[lane] = mine[0];
        workgroupBarrier();
        for (var i = 0u; i < STRETCHES; i++) {
            sum += stretches[i];
        }
        workgroupBarrier();
    }
    return sum;
}

struct Spread {
    mean: f32,  // 0 where not centred
    scale: f32,
}

// Of the row whose first vec4 is `base`: `width` columns in `width4` vec4s, of which lane l reads l, l + LANES, ..
// What stands beyond the width counts nothing. Loops are left at their ends (`shared/product.wgsl` says why).
fn spread(base: u32, width: u32, width4: u32, centred: bool, eps: f32, lane: u32) -> Spread {
    let last = width4 - 1u;
    var mean = 0.0;
    if centred {
        var sums: Stretches;
        var first = 0u;
        loop {
            for (var j = 0u; j < PER_LANE; j++) {
                let i = first + j * LANES + lane;
                let v = x[base + min(i, last)];
                sums[j] += select(0.0, (v.x + v.y) + (v.z + v.w), i <= last);
            }
            first += STRETCHES;
            if first >= width4 {
                break;
            }
        }
        mean = total(lane, sums) / f32(width);
    }
    var squares: Stretches;
    var first = 0u;
    loop {
        for (var j = 0u; j < PER_LANE; j++) {
            let i = first + j * LANES + lane;
            let column = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
            let d = select(vec4<f32>(0.0), x[base + min(i, last)] - vec4<f32>(mean), column < vec4<u32>(width));
            squares[j] += (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
        }
        first += STRETCHES;
        if first >= width4 {
            break;
        }
    }
    return Spread(mean, 1.0 / sqrt(total(lane, squares) / f32(width) + eps));
}

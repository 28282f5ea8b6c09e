// What an adapter's matrix units allow: out = out + rounds * a * b, four times over for each workgroup. A matrix is SIDE
// columns of SIDE rows; every subgroup of a workgroup makes the same.
enable f16;
enable wgpu_cooperative_matrix;

struct Params {
    rounds: u32,
    subgroups_at: u32, // element of out that gets how many subgroups a workgroup has
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> factors: array<f16>;        // [2, SIDE, SIDE] a and b
@group(0) @binding(2) var<storage, read_write> out: array<f32>; // [groups, 4, SIDE, SIDE], and one more

override WORKGROUP: u32 = 32u;
@if(tile16) const SIDE: u32 = 16u;
@else const SIDE: u32 = 8u;
@if(tile16) alias Left = coop_mat16x16<f16, A>;
@else alias Left = coop_mat8x8<f16, A>;
@if(tile16) alias Right = coop_mat16x16<f16, B>;
@else alias Right = coop_mat8x8<f16, B>;
@if(tile16) alias Sum = coop_mat16x16<f32, C>;
@else alias Sum = coop_mat8x8<f32, C>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_subgroups) subgroups: u32) {
    let a = coopLoad<Left>(&factors[0], SIDE);
    let b = coopLoad<Right>(&factors[SIDE * SIDE], SIDE);
    let first = group.x * 4u * SIDE * SIDE;
    var sum_0 = coopLoad<Sum>(&out[first], SIDE);
    var sum_1 = coopLoad<Sum>(&out[first + SIDE * SIDE], SIDE);
    var sum_2 = coopLoad<Sum>(&out[first + 2u * SIDE * SIDE], SIDE);
    var sum_3 = coopLoad<Sum>(&out[first + 3u * SIDE * SIDE], SIDE);
    // Nobody stores before all have loaded.
    storageBarrier();
    for (var round = 0u; round < p.rounds; round++) {
        sum_0 = coopMultiplyAdd(a, b, sum_0);
        sum_1 = coopMultiplyAdd(a, b, sum_1);
        sum_2 = coopMultiplyAdd(a, b, sum_2);
        sum_3 = coopMultiplyAdd(a, b, sum_3);
    }
    coopStore(sum_0, &out[first], SIDE);
    coopStore(sum_1, &out[first + SIDE * SIDE], SIDE);
    coopStore(sum_2, &out[first + 2u * SIDE * SIDE], SIDE);
    coopStore(sum_3, &out[first + 3u * SIDE * SIDE], SIDE);
    if group.x == 0u {
        out[p.subgroups_at] = f32(subgroups);
    }
}

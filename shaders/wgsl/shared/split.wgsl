// A context is cut into splits of 256 positions at absolute multiples of 256. Each has an online softmax of its own; they
// are merged one after another, from the first on, whoever made them.
const SPLIT: u32 = 256u;

// What the sums so far and those of the next split count when both are relative to the larger of their largest scores.
struct Shares {
    largest: f32,
    before: f32,
    next: f32,
}

fn shares(before: f32, next: f32) -> Shares {
    let largest = max(before, next);
    return Shares(largest, exp(before - largest), exp(next - largest));
}

fn add_denominator(s: Shares, before: f32, next: f32) -> f32 {
    return fma(next, s.next, before * s.before);
}

fn add_values(s: Shares, before: vec4<f32>, next: vec4<f32>) -> vec4<f32> {
    return fma(next, vec4<f32>(s.next), before * s.before);
}

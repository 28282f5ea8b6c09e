// x[t] = wte[token[t]] * scale (+ wpe[position[t]]), of the tokens whose rows of wte are bound. Rows that follow those of the
// step before it take the tokens that it sampled.
import package::shared::weight::{BLOCK4, column_start, column_step};
import package::shared::matrix::unit_at; // binding 2: a chunk of wte [V, H/4], as any matrix in f32

struct Params {
    rows: u32,          // T
    width4: u32,        // H / 4
    first: u32,         // the token of the chunk's first row
    height4: u32,       // a quarter of the chunk's rows
    has_positions: u32, // 0: positions are rotary, wpe is any buffer
    follows: u32,       // 1: row t has the token sampled[t], not the one that tokens names
    scale: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<vec2<u32>>;  // [T] (token id, position)
@group(0) @binding(3) var<storage, read> wpe: array<vec4<f32>>;     // [S, H/4]
@group(0) @binding(4) var<storage, read> sampled: array<u32>;       // [T], any buffer where no rows follow
@group(0) @binding(5) var<storage, read_write> x: array<vec4<f32>>; // [T, H/4]

override WORKGROUP: u32 = 32u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.y;
    if column >= p.width4 || row >= p.rows {
        return;
    }
    let token = tokens[row];
    var word = token.x;
    if p.follows != 0u {
        word = sampled[row];
    }
    if word < p.first || word - p.first >= 4u * p.height4 {
        return;
    }
    let within = word - p.first;
    let four = within / 4u;
    let stride = (p.width4 + BLOCK4 - 1u) / BLOCK4 * BLOCK4;
    let at = column_start(four, stride) + (4u * column + within % 4u) * column_step(four, p.height4);
    var value = unit_at(at) * p.scale;
    if p.has_positions != 0u {
        value += wpe[token.y * p.width4 + column];
    }
    x[row * p.width4 + column] = value;
}

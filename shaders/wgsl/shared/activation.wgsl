// GELU in GPT-2's tanh form. tanh(u) = 1 - 2 / (exp(2u) + 1) stays finite where exp overflows.
fn gelu(x: vec4<f32>) -> vec4<f32> {
    let u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    let tanh_u = vec4<f32>(1.0) - vec4<f32>(2.0) / (exp(2.0 * u) + vec4<f32>(1.0));
    return 0.5 * x * (vec4<f32>(1.0) + tanh_u);
}

// SwiGLU: silu(gate) * up.
fn swiglu(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
    return gate / (vec4<f32>(1.0) + exp(-gate)) * up;
}

// gpt_oss's GLU: the gate is clamped above, the other input on both sides.
fn clamped_glu(gate: vec4<f32>, up: vec4<f32>, limit: f32) -> vec4<f32> {
    let g = min(gate, vec4<f32>(limit));
    let u = clamp(up, vec4<f32>(-limit), vec4<f32>(limit));
    return (u + vec4<f32>(1.0)) * (g / (vec4<f32>(1.0) + exp(-1.702 * g)));
}

// GELU in GPT-2's tanh form. tanh(u) = 1 - 2 / (exp(2u) + 1) stays finite where exp overflows.
fn gelu(x: vec4<f32>) -> vec4<f32> {
    let u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    let tanh_u = vec4<f32>(1.0) - vec4<f32>(2.0) / (exp(2.0 * u) + vec4<f32>(1.0));
    return 0.5 * x * (vec4<f32>(1.0) + tanh_u);
}

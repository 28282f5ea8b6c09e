//! What tensors are called on disk, family by family.

use crate::ModelSpec;

/// The names of one model's tensors.
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) final_norm: &'static str,
    /// Without the layer's number and the dot behind it.
    layers: &'static str,
    pub(super) norm_1: &'static str,
    pub(super) norm_2: &'static str,
    pub(super) router: &'static str,
    pub(super) router_bias: &'static str,
    pub(super) correction: &'static str,
    /// What the MoE's tensors stand under.
    pub(super) moe: &'static str,
    /// Gate, up and down of an expert or a dense FFN; up alone where there is no gate.
    pub(super) ffn: [&'static str; 3],
    /// What the shared expert stands under.
    pub(super) shared: &'static str,
    pub(super) experts: ExpertForm,
}

/// How a layer's experts lie on disk. E experts, I intermediate, H hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExpertForm {
    /// `w1 [E, I, H]`, `b1`, `w2 [E, H, I]`, `b2`.
    Stacked,
    /// Three matrices for each expert; or, as they lie in transformers' memory, `gate_up_proj [E, 2I, H]` and
    /// `down_proj [E, H, I]`.
    Each,
    /// `input_linear [E, 2I, H]`, gate above up, and `output_linear [E, H, I]`.
    Granite,
    /// `gate_up_proj [E, H, 2I]`, gate and up in turn, `down_proj [E, I, H]`, with biases; or MXFP4 blocks of their
    /// transposes.
    GptOss,
}

impl Names {
    pub(super) fn of(spec: &ModelSpec) -> Self {
        let usual = Self {
            embedding: "model.embed_tokens.weight",
            final_norm: "model.norm",
            layers: "model.layers",
            norm_1: "input_layernorm",
            norm_2: "post_attention_layernorm",
            router: "mlp.gate.weight",
            router_bias: "",
            correction: "mlp.gate.e_score_correction_bias",
            moe: "mlp",
            ffn: ["gate_proj", "up_proj", "down_proj"],
            shared: "mlp.shared_experts",
            experts: ExpertForm::Each,
        };
        match spec.model_type.as_str() {
            "gpt_moe" => Self {
                embedding: "wte.weight",
                final_norm: "ln_f",
                layers: "h",
                norm_1: "ln_1",
                norm_2: "ln_2",
                router: "moe.gate.weight",
                moe: "moe",
                experts: ExpertForm::Stacked,
                ..usual
            },
            "mixtral" | "phimoe" => Self {
                router: "block_sparse_moe.gate.weight",
                moe: "block_sparse_moe",
                ffn: ["w1", "w3", "w2"],
                ..usual
            },
            "granitemoe" => Self {
                router: "block_sparse_moe.router.layer.weight",
                moe: "block_sparse_moe",
                experts: ExpertForm::Granite,
                ..usual
            },
            "gpt_oss" => Self {
                router: "mlp.router.weight",
                router_bias: "mlp.router.bias",
                experts: ExpertForm::GptOss,
                ..usual
            },
            "qwen2_moe" => Self { shared: "mlp.shared_expert", ..usual },
            _ => usual,
        }
    }

    /// The layer that a tensor is of, and its name within it.
    pub(super) fn layer_of<'n>(&self, tensor: &'n str) -> Option<(usize, &'n str)> {
        let rest = tensor.strip_prefix(self.layers)?.strip_prefix('.')?;
        let (layer, rest) = rest.split_once('.')?;
        Some((layer.parse().ok()?, rest))
    }

    /// A tensor of a layer.
    pub(super) fn of_layer(&self, layer: usize, part: &str) -> String {
        format!("{}.{layer}.{part}", self.layers)
    }
}

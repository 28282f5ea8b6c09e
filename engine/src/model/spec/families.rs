//! What each `model_type` is made of: config.json's keys, in both spellings, to one description.

use super::keys::Keys;
use super::{
    Activation, AttentionSpec, FfnSpec, LatentSpec, ModelSpec, NormSpec, QkNorm, RouterSpec, Score,
    SharedSpec, rope,
};
use crate::EngineError;
use exflow_shaders::{MAX_EXPERTS, MAX_GROUPS, MAX_HEAD_SIZE};

const KNOWN: [&str; 10] = [
    "gpt_moe",
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "qwen2_moe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
];

const MAX_WIDTH: usize = 1 << 20;

pub(super) fn spec(keys: &Keys) -> Result<ModelSpec, EngineError> {
    let known = || format!("use a model of one of {}", KNOWN.join(", "));
    let Some(family) = keys.text("model_type") else {
        return Err(keys.bad("model_type", "missing", known()));
    };
    let spec = match family {
        "gpt_moe" => gpt_moe(keys)?,
        "mixtral" | "olmoe" | "qwen3_moe" | "qwen2_moe" | "granitemoe" | "phimoe" | "gpt_oss" => {
            grouped_query(keys, family)?
        }
        "deepseek_v2" | "deepseek_v3" => deepseek(keys, family)?,
        other => return Err(keys.bad("model_type", format!("{other:?} is not known"), known())),
    };
    if spec.moe_layers.is_empty() {
        return Err(keys.bad("num_hidden_layers", "none of the layers is a MoE layer", "use a MoE model"));
    }
    Ok(spec)
}

/// The paper's form: GPT-2 blocks in which every FFN is a MoE.
fn gpt_moe(keys: &Keys) -> Result<ModelSpec, EngineError> {
    let hidden = keys.count(&["n_embd"], 1 << 16)?;
    let (experts, top_k) = experts(keys, &["num_experts"], &["top_k"], None)?;
    let heads = keys.count(&["n_head"], 1 << 12)?;
    if !hidden.is_multiple_of(heads) || hidden / heads > MAX_HEAD_SIZE {
        let what =
            format!("{heads} heads do not divide n_embd {hidden} into heads of at most {MAX_HEAD_SIZE}");
        return Err(keys.bad("n_head", what, "set it to a divisor of n_embd"));
    }
    let layers = keys.count(&["n_layer"], 4096)?;
    let head_dim = hidden / heads;
    let base = Base {
        hidden,
        layers,
        context: keys.count(&["n_positions"], 1 << 24)?,
        norm: NormSpec { centred: true, eps: keys.eps("layer_norm_epsilon", None)? },
    };
    let attention = AttentionSpec {
        heads,
        kv_heads: heads,
        head_dim,
        value_dim: head_dim,
        qkv_bias: true,
        out_bias: true,
        clip: None,
        qk_norm: None,
        rope: None,
        windows: vec![None; layers],
        sinks: false,
        scale: 1.0 / (head_dim as f32).sqrt(),
        latent: None,
    };
    let intermediate = keys.count(&["n_inner"], MAX_WIDTH)?;
    let expert = FfnSpec { intermediate, activation: Activation::Gelu, bias: true, limit: 0.0 };
    let renormalise = keys.flag("norm_topk_prob")?.unwrap_or(top_k > 1);
    let mut spec = base.spec(keys, attention, (experts, top_k), expert)?;
    spec.router.renormalise = renormalise;
    spec.learned_positions = true;
    Ok(spec)
}

/// Decoders with rotary positions and key heads that query heads share.
fn grouped_query(keys: &Keys, family: &str) -> Result<ModelSpec, EngineError> {
    let default_experts = match family {
        "mixtral" | "granitemoe" => Some((8, 2)),
        "phimoe" => Some((16, 2)),
        "qwen3_moe" => Some((128, 8)),
        "qwen2_moe" => Some((60, 4)),
        "gpt_oss" => Some((128, 4)),
        _ => Some((64, 8)),
    };
    let names: (&[&str], &[&str]) =
        (&["num_experts", "num_local_experts"], &["num_experts_per_tok", "experts_per_token"]);
    let (experts, top_k) = experts(keys, names.0, names.1, default_experts)?;
    let centred = family == "phimoe";
    let base = Base::read(keys, centred, if family.starts_with("qwen") { 1e-6 } else { 1e-5 })?;
    let mut attention = attention(keys, &base, family)?;
    let (sliding, layers) = (keys.count_if_there(&["sliding_window"], usize::MAX), base.layers);
    attention.windows = windows(keys, family, sliding.ok().flatten(), layers)?;

    let inner: &[&str] =
        if family.starts_with("qwen") { &["moe_intermediate_size"] } else { &["intermediate_size"] };
    let gpt_oss = family == "gpt_oss";
    let mut limit = 0.0;
    if gpt_oss {
        only(keys, "swiglu_alpha", 1.702)?;
        limit = keys.number(&["swiglu_limit"], 1e-3, 1e9)?.unwrap_or(7.0) as f32;
    }
    silu(keys)?;
    let activation = if gpt_oss { Activation::ClampedGlu } else { Activation::SwiGlu };
    let expert = FfnSpec { intermediate: keys.count(inner, MAX_WIDTH)?, activation, bias: gpt_oss, limit };
    let mut spec = base.spec(keys, attention, (experts, top_k), expert)?;
    spec.router.score = match family {
        "granitemoe" | "gpt_oss" => Score::SoftmaxOfChosen,
        "phimoe" => {
            if top_k != 2 {
                return Err(keys.bad(
                    "num_experts_per_tok",
                    format!("{top_k}"),
                    "set it to 2, all that sparsemixer is defined for",
                ));
            }
            let jitter = keys.number(&["router_jitter_noise"], 0.0, 1.0)?.unwrap_or(0.01);
            Score::Sparsemixer(2.0 * jitter as f32)
        }
        _ => Score::Softmax,
    };
    let method = keys.object("quantization_config")?.and_then(|of| of.get("quant_method"));
    spec.packed_experts = gpt_oss && method.is_some_and(|method| method == "mxfp4");
    spec.router.bias = gpt_oss;
    spec.router.renormalise = family == "mixtral" || keys.flag("norm_topk_prob")?.unwrap_or(false);
    if family == "granitemoe" {
        let multiplier =
            |name| -> Result<f32, EngineError> { Ok(keys.number(&[name], -1e6, 1e6)?.unwrap_or(1.0) as f32) };
        spec.embedding_scale = multiplier("embedding_multiplier")?;
        spec.residual_scale = multiplier("residual_multiplier")?;
        spec.logit_scale = 1.0 / keys.number(&["logits_scaling"], 1e-6, 1e6)?.unwrap_or(1.0) as f32;
    }
    spec.head_bias = family == "phimoe" && keys.flag("lm_head_bias")?.unwrap_or(false);
    if family.starts_with("qwen") {
        qwen_layers(keys, family, &mut spec)?;
    }
    Ok(spec)
}

/// Dense layers among MoE layers, and qwen2's shared expert.
fn qwen_layers(keys: &Keys, family: &str, spec: &mut ModelSpec) -> Result<(), EngineError> {
    let step = keys.count_or(&["decoder_sparse_step"], 4096, 1)?;
    let dense: Vec<u64> = match keys.get(&["mlp_only_layers"]) {
        None => Vec::new(),
        Some(value) => {
            let list = value.as_array().and_then(|list| list.iter().map(|v| v.as_u64()).collect());
            let wrong = || keys.bad("mlp_only_layers", format!("{value} is no list of layers"), "use null");
            list.ok_or_else(wrong)?
        }
    };
    spec.moe_layers.retain(|&l| (l + 1).is_multiple_of(step) && !dense.contains(&(l as u64)));
    if spec.moe_layers.len() < spec.layers {
        let intermediate = keys.count(&["intermediate_size"], MAX_WIDTH)?;
        spec.dense = Some(FfnSpec { intermediate, ..spec.expert });
    }
    if family == "qwen2_moe" {
        let intermediate = keys.count(&["shared_expert_intermediate_size"], MAX_WIDTH)?;
        spec.shared = Some(SharedSpec { ffn: FfnSpec { intermediate, ..spec.expert }, gated: true });
    }
    Ok(())
}

/// DeepSeek: latent attention, shared experts, routers with groups.
fn deepseek(keys: &Keys, family: &str) -> Result<ModelSpec, EngineError> {
    let third = family == "deepseek_v3";
    let default = if third { Some((256, 8)) } else { None };
    let (experts, top_k) = experts(keys, &["n_routed_experts"], &["num_experts_per_tok"], default)?;
    let base = Base::read(keys, false, 1e-6)?;
    silu(keys)?;
    let rank = |name| keys.count(&[name], 1 << 16);
    let latent = LatentSpec {
        q_rank: keys.count_if_there(&["q_lora_rank"], 1 << 16)?,
        kv_rank: rank("kv_lora_rank")?,
        nope: rank("qk_nope_head_dim")?,
        rope: rank("qk_rope_head_dim")?,
        value: rank("v_head_dim")?,
        bias: keys.flag("attention_bias")?.unwrap_or(false),
        eps: 1e-6, // transformers gives the latents' norms their default
    };
    if latent.kv_rank > MAX_HEAD_SIZE {
        let what = format!("{} is more than {MAX_HEAD_SIZE}", latent.kv_rank);
        return Err(keys.bad("kv_lora_rank", what, "use a model with a smaller one"));
    }
    let mut turns = rope::read(keys, latent.rope, 10_000.0, base.context)?;
    turns.interleaved = !third || keys.flag("rope_interleave")?.unwrap_or(true);
    let mut scale = ((latent.nope + latent.rope) as f64).powf(-0.5);
    if turns.scaling != rope::RopeScaling::Default {
        scale *= latent_temperature(keys)?.powi(2);
    }
    let attention = AttentionSpec {
        heads: keys.count(&["num_attention_heads"], 1 << 12)?,
        kv_heads: 1,
        head_dim: latent.kv_rank + latent.rope,
        value_dim: latent.kv_rank,
        qkv_bias: false,
        out_bias: latent.bias,
        clip: None,
        qk_norm: None,
        rope: Some(turns),
        windows: vec![None; base.layers],
        sinks: false,
        scale: scale as f32,
        latent: Some(latent),
    };
    let intermediate = keys.count(&["moe_intermediate_size"], MAX_WIDTH)?;
    let expert = FfnSpec { intermediate, activation: Activation::SwiGlu, bias: false, limit: 0.0 };
    let mut spec = base.spec(keys, attention, (experts, top_k), expert)?;

    let first = keys.whole("first_k_dense_replace", 4096, if third { 3 } else { 0 })?;
    let step = keys.count_or(&["moe_layer_freq"], 4096, 1)?;
    spec.moe_layers.retain(|&l| l >= first && l.is_multiple_of(step));
    if spec.moe_layers.len() < spec.layers {
        let intermediate = keys.count(&["intermediate_size"], MAX_WIDTH)?;
        spec.dense = Some(FfnSpec { intermediate, ..expert });
    }
    if let Some(shared) = keys.count_if_there(&["n_shared_experts"], 1024)? {
        let ffn = FfnSpec { intermediate: shared * intermediate, ..expert };
        spec.shared = Some(SharedSpec { ffn, gated: false });
    }
    spec.router = RouterSpec {
        score: if third { Score::Sigmoid } else { Score::Softmax },
        // deepseek_v2's flag is ignored by transformers, and false in every published model.
        renormalise: third && keys.flag("norm_topk_prob")?.unwrap_or(true),
        bias: false,
        correction: third,
        groups: groups(keys, third, experts, top_k)?,
        scale: keys.number(&["routed_scaling_factor"], 0.0, 1e6)?.unwrap_or(if third { 2.5 } else { 1.0 })
            as f32,
    };
    Ok(spec)
}

/// The attention temperature that DeepSeek takes from YaRN's `mscale_all_dim`.
fn latent_temperature(keys: &Keys) -> Result<f64, EngineError> {
    let map = keys.object("rope_parameters")?.or(keys.object("rope_scaling")?);
    let Some(map) = map else { return Ok(1.0) };
    let inner = Keys { path: keys.path, map, under: "rope_scaling." };
    let factor = inner.number(&["factor"], 1e-3, 1e6)?.unwrap_or(1.0);
    let all = inner.number(&["mscale_all_dim"], 0.0, 1e3)?.unwrap_or(0.0);
    Ok(if all == 0.0 { 1.0 } else { rope::yarn_mscale(factor, all) })
}

fn groups(
    keys: &Keys,
    third: bool,
    experts: usize,
    top_k: usize,
) -> Result<Option<(usize, usize, usize)>, EngineError> {
    let method = keys.text("topk_method").unwrap_or(if third { "noaux_tc" } else { "greedy" });
    if !third && method == "greedy" {
        return Ok(None);
    }
    let count = keys.count_or(&["n_group"], MAX_GROUPS, if third { 8 } else { 1 })?;
    let kept = keys.count_or(&["topk_group"], count, if third { 4.min(count) } else { 1 })?;
    if !experts.is_multiple_of(count) {
        let what = format!("{count} groups do not divide {experts} experts");
        return Err(keys.bad("n_group", what, "use the config.json that belongs to the model"));
    }
    if kept * (experts / count) < top_k {
        let what = format!("{kept} groups of {} experts hold fewer than the {top_k} chosen", experts / count);
        return Err(keys.bad("topk_group", what, "use the config.json that belongs to the model"));
    }
    Ok((count > 1).then_some((count, kept, if third { 2 } else { 1 })))
}

/// What every family has.
struct Base {
    hidden: usize,
    layers: usize,
    context: usize,
    norm: NormSpec,
}

impl Base {
    fn read(keys: &Keys, centred: bool, eps: f64) -> Result<Self, EngineError> {
        Ok(Self {
            hidden: keys.count(&["hidden_size"], 1 << 16)?,
            layers: keys.count(&["num_hidden_layers"], 4096)?,
            context: keys.count(&["max_position_embeddings"], 1 << 24)?,
            norm: NormSpec { centred, eps: keys.eps("rms_norm_eps", Some(eps))? },
        })
    }

    /// A model of MoE layers alone, with a plain softmax router.
    fn spec(
        self,
        keys: &Keys,
        attention: AttentionSpec,
        (experts, top_k): (usize, usize),
        expert: FfnSpec,
    ) -> Result<ModelSpec, EngineError> {
        let vocab_size = keys.count(&["vocab_size"], 1 << 24)?;
        Ok(ModelSpec {
            model_type: keys.text("model_type").unwrap_or_default().to_owned(),
            vocab_size,
            max_positions: stretched(&attention, self.context),
            hidden: self.hidden,
            layers: self.layers,
            moe_layers: (0..self.layers).collect(),
            draft_layers: keys.whole("num_nextn_predict_layers", 4096, 0)?,
            norm: self.norm,
            attention,
            router: RouterSpec {
                score: Score::Softmax,
                renormalise: false,
                bias: false,
                correction: false,
                groups: None,
                scale: 1.0,
            },
            experts,
            top_k,
            expert,
            shared: None,
            dense: None,
            learned_positions: false,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            packed_experts: false,
            tied_head: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            head_bias: false,
            bos: keys.ids("bos_token_id", vocab_size)?.first().copied(),
            eos: keys.ids("eos_token_id", vocab_size)?,
            digest: String::new(),
        })
    }
}

/// The longest context: config.json may give the one before rotary positions were stretched.
fn stretched(attention: &AttentionSpec, context: usize) -> usize {
    let to = match attention.rope.as_ref().map(|rope| &rope.scaling) {
        Some(rope::RopeScaling::Dynamic { factor, .. }) => factor * context as f64,
        Some(rope::RopeScaling::Yarn { factor, original, .. }) => factor * original,
        _ => 0.0,
    };
    context.max(to.min(f64::from(1 << 24)) as usize)
}

fn experts(
    keys: &Keys,
    experts: &[&str],
    top_k: &[&str],
    default: Option<(usize, usize)>,
) -> Result<(usize, usize), EngineError> {
    let (count, chosen) = match default {
        Some((e, k)) => (keys.count_or(experts, MAX_EXPERTS, e)?, keys.count_or(top_k, 64, k)?),
        None => (keys.count(experts, MAX_EXPERTS)?, keys.count(top_k, 64)?),
    };
    if chosen > count {
        let name = experts[0];
        let what = format!("{chosen} is more than {name}, which is {count}");
        return Err(keys.bad(top_k[0], what, format!("set it to at most {name}")));
    }
    Ok((count, chosen))
}

fn attention(keys: &Keys, base: &Base, family: &str) -> Result<AttentionSpec, EngineError> {
    let heads = keys.count(&["num_attention_heads"], 1 << 12)?;
    let kv_heads = match keys.count_if_there(&["num_key_value_heads"], heads)? {
        Some(kv_heads) => kv_heads,
        None if matches!(family, "mixtral" | "phimoe") => 8.min(heads),
        None => heads,
    };
    if !heads.is_multiple_of(kv_heads) {
        let what = format!("{kv_heads} key heads do not divide {heads} heads");
        return Err(keys.bad("num_key_value_heads", what, "set it to a divisor of num_attention_heads"));
    }
    let head_dim = match keys.count_if_there(&["head_dim"], MAX_HEAD_SIZE)? {
        Some(head_dim) => head_dim,
        None if base.hidden.is_multiple_of(heads) && base.hidden / heads <= MAX_HEAD_SIZE => {
            base.hidden / heads
        }
        None => {
            let what = format!("{heads} heads do not divide hidden_size {}", base.hidden);
            return Err(keys.bad("num_attention_heads", what, "set it to a divisor, or give head_dim"));
        }
    };
    let share = keys.number(&["partial_rotary_factor"], 0.0, 1.0)?.unwrap_or(1.0);
    let theta = match family {
        "mixtral" | "phimoe" => 1e6,
        "gpt_oss" => 150_000.0,
        _ => 10_000.0,
    };
    let turning = (head_dim as f64 * share) as usize;
    let biased = keys.flag("attention_bias")?;
    let qkv_bias = match family {
        "qwen2_moe" => keys.flag("qkv_bias")?.unwrap_or(true),
        "gpt_oss" => biased.unwrap_or(true),
        _ => biased.unwrap_or(false),
    };
    let scale = match family {
        "granitemoe" => keys.number(&["attention_multiplier"], -1e6, 1e6)?.unwrap_or(1.0),
        _ => (head_dim as f64).powf(-0.5),
    };
    let clip = match family {
        "olmoe" => keys.number(&["clip_qkv"], 1e-6, 1e9)?.map(|limit| limit as f32),
        _ => None,
    };
    Ok(AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        value_dim: head_dim,
        qkv_bias,
        out_bias: qkv_bias && family != "qwen2_moe",
        clip,
        qk_norm: match family {
            "olmoe" => Some(QkNorm::Projection),
            "qwen3_moe" => Some(QkNorm::Head),
            _ => None,
        },
        rope: Some(rope::read(keys, turning, theta, base.context)?),
        windows: vec![None; base.layers],
        sinks: family == "gpt_oss",
        scale: scale as f32,
        latent: None,
    })
}

/// Each layer's window: as `layer_types` says, else by the family's rule.
fn windows(
    keys: &Keys,
    family: &str,
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>, EngineError> {
    let used = match family {
        "qwen2_moe" | "qwen3_moe" => keys.flag("use_sliding_window")?.unwrap_or(false),
        "mixtral" | "phimoe" | "gpt_oss" => true,
        _ => false,
    };
    let window = match family {
        "gpt_oss" => window.or(Some(128)),
        _ => window,
    };
    let Some(window) = window.filter(|_| used) else { return Ok(vec![None; layers]) };
    let alternating = matches!(family, "qwen2_moe" | "gpt_oss");
    if let (true, Some(value)) = (alternating, keys.get(&["layer_types"])) {
        let kinds: Vec<&str> = value.as_array().into_iter().flatten().filter_map(|v| v.as_str()).collect();
        if kinds.len() != layers || kinds.iter().any(|k| !["sliding_attention", "full_attention"].contains(k))
        {
            let what = "not one of sliding_attention and full_attention for every layer";
            return Err(keys.bad("layer_types", what, "use the config.json that belongs to the model"));
        }
        return Ok(kinds.iter().map(|&kind| (kind == "sliding_attention").then_some(window)).collect());
    }
    let most = if family == "qwen2_moe" { keys.whole("max_window_layers", 4096, 28)? } else { layers };
    Ok((0..layers).map(|l| (!alternating || (l.is_multiple_of(2) && l < most)).then_some(window)).collect())
}

fn silu(keys: &Keys) -> Result<(), EngineError> {
    match keys.text("hidden_act") {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => {
            Err(keys.bad("hidden_act", format!("{other:?} is not supported"), "use a model that has silu"))
        }
    }
}

/// A constant of the kernels that config.json may repeat.
fn only(keys: &Keys, name: &str, value: f64) -> Result<(), EngineError> {
    match keys.number(&[name], -1e9, 1e9)? {
        Some(x) if (x - value).abs() > 1e-9 => {
            Err(keys.bad(name, format!("{x} is not supported"), format!("use a model that has {value}")))
        }
        _ => Ok(()),
    }
}

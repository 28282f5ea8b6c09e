//! Tensors that a config has no place for. What is missing or has another shape shows when it is read; what is left over
//! would go unnoticed, and the model would be another one.

use super::Store;
use super::names::Names;
use crate::{EngineError, ModelSpec};

/// Refuses layers and experts beyond the config's counts, and biases of a model that has none.
pub(crate) fn check(spec: &ModelSpec, store: &Store) -> Result<(), EngineError> {
    let names = Names::of(spec);
    for (name, path) in store.names() {
        if let Some(what) = no_place(spec, &names, &name) {
            let remedy = "use the config.json that belongs to these weights";
            return Err(EngineError::tensor(path, &name, what, remedy));
        }
    }
    Ok(())
}

/// What the config says against a tensor.
fn no_place(spec: &ModelSpec, names: &Names, tensor: &str) -> Option<String> {
    let number = |text: &str| text.split('.').next()?.parse::<usize>().ok();
    if let Some((layer, rest)) = names.layer_of(tensor) {
        if layer >= spec.layers + spec.draft_layers {
            return Some(format!("config.json has {} layers", spec.layers));
        }
        let expert = rest.split_once("experts.").and_then(|(_, rest)| number(rest));
        if expert.is_some_and(|expert| expert >= spec.experts) && layer < spec.layers {
            return Some(format!("config.json has {} experts", spec.experts));
        }
        let projection = |part: &str| rest == format!("self_attn.{part}_proj.bias");
        let attention = &spec.attention;
        if ["q", "k", "v"].into_iter().any(projection) && !attention.qkv_bias && attention.latent.is_none()
            || projection("o") && !attention.out_bias
        {
            return Some("config.json says that there is no such bias".to_owned());
        }
    }
    (tensor == "lm_head.bias" && !spec.head_bias)
        .then(|| "config.json says that there is no such bias".to_owned())
}

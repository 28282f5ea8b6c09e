//! From safetensors files to device buffers: every tensor checked, each rank reading only its own experts.

mod layers;
mod store;

pub(crate) use layers::{Dense, Experts, LayerWeights, ModelWeights, Norm};
pub(crate) use store::Store;

//! From safetensors files to device buffers: every tensor checked, each rank reading only its own experts.

mod attention;
mod experts;
mod formats;
mod layers;
mod names;
mod rows;
mod store;

pub(crate) use attention::{AttentionWeights, LatentWeights};
pub(crate) use experts::Ffn;
pub(crate) use layers::{Dense, LayerFfn, LayerWeights, Matrix, ModelWeights, Norm};
pub(crate) use store::Store;

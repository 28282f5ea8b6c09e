//! From safetensors files to device buffers: every tensor checked, each rank reading only its own experts.

mod agreement;
mod assembly;
mod attention;
mod chunks;
mod experts;
#[cfg(test)]
mod experts_tests;
mod formats;
mod layers;
mod names;
pub(crate) mod pack;
mod rows;
mod store;
mod vocabulary;

pub(crate) use agreement::check;
pub(crate) use assembly::Assembly;
pub(crate) use attention::{AttentionWeights, LatentWeights};
pub(crate) use chunks::Chunk;
pub(crate) use experts::{Ffn, PackedExperts, Shelf};
pub(crate) use layers::{Dense, LayerFfn, LayerWeights, Matrix, ModelWeights, Norm, form_of};
pub(crate) use store::Store;
#[cfg(test)]
pub(crate) use store::header;

/// Checks the header of a safetensors file in memory: every tensor's bytes are within it and its own. Returns how many
/// tensors there are.
///
/// # Errors
/// What is wrong with it.
pub fn check_safetensors(bytes: &[u8]) -> Result<usize, String> {
    store::header(bytes).map(|(_, metadata)| metadata.offset_keys().len())
}

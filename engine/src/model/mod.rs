//! What a model is: its shape, read from config.json, and the launches of its layers.

pub(crate) mod decoder;
pub(crate) mod scratch;
pub mod spec;

pub use spec::ModelSpec;
pub(crate) use spec::{FfnSpec, LatentSpec, QkNorm, Score};

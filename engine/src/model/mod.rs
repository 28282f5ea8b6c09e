//! What a model is: its shape, read from config.json, and the launches of its layers.

pub(crate) mod decoder;
pub(crate) mod scratch;
mod spec;

pub use spec::ModelSpec;

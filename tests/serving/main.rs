//! What many users at once meet: the engine that threads share, and the server over real HTTP.

#[path = "../common/mod.rs"]
mod common;
mod engine;
#[cfg(feature = "server")]
mod http;
#[cfg(feature = "server")]
mod load;
mod replacing;

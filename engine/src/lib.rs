//! Mixture-of-Experts models on GPUs, their experts spread over ranks.
//!
//! [`Engine`] is the entry for programs with many users: requests come and go on any thread. Beneath it, [`Cluster`]
//! runs one batch at a time: it loads a model folder onto ranks, each with its own wgpu device and its own
//! experts, joins them through `exflow-transport`, and runs requests. The way of a token: text → ids
//! ([`TextCodec`]) → sequence → the loop of a rank (`runtime/worker.rs`) → the layers of a step
//! (`runtime/step/`, whose launches are in `model/decoder/`) → id → text.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod bench;
mod chat;
mod cluster;
mod error;
mod generate;
mod gpu;
mod logits;
mod model;
mod options;
mod os;
mod output;
pub mod plan;
mod runtime;
mod sampling;
mod selftest;
mod service;
mod stats;
mod text;
mod weights;

#[cfg(test)]
mod hostile_tests;

pub use bench::{DeviceRates, KernelRate, bench_device, bench_kernels, tune};
pub use chat::{ChatTemplate, Message};
pub use cluster::{Cluster, work};
pub use error::EngineError;
pub use exflow_placement::{Affinity, PlacementTable, Rank, RoutingTrace, Strategy};
pub use generate::{Completion, Generation, Hop, Request, TokenEvent};
pub use gpu::{
    DeviceMemory, DeviceReport, FormTuning, KeptPipelines, Probe, TileUpTo, TuningReport, devices,
    keep_pool_from_bytes, launch_threads_set, pool_from_bytes, prepare_process, probe,
};
pub use logits::{LayerRouting, LogitsDump};
pub use model::{ModelSpec, spec};
pub use options::{
    ClusterOptions, Combine, Domain, Dtype, Feed, GroupOptions, KvDtype, KvWire, Linger, NoProgress,
    Numerics, Observer, Overlap, PlacementSource, Prefill, Progress, Quant, Schedule, TransportKind,
};
pub use runtime::{FinishReason, SETTLING_STEPS};
pub use sampling::{Logprobs, MAX_LOGPROBS, Sampling};
pub use selftest::{KernelCheck, selftest};
pub use service::{Engine, EngineOptions, LiveRank, LiveStats, MoveCounts, RequestCounts, Tokens};
pub use stats::{BytesByClass, RunStats, TokenTime};
pub use text::{TextCodec, TextStream};
pub use weights::check_safetensors;

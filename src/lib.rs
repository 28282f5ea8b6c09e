//! Mixture-of-Experts language models with their experts spread over several GPUs, over ordinary networks.
//!
//! A token is sent once per MoE layer, to the rank that holds its expert, and stays there (*context-coherent
//! expert parallelism*); experts that follow one another are placed on the same rank (*inter-layer expert
//! affinity*). Both ideas are of "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts
//! Model Inference" (arXiv 2401.08383).
//!
//! # A tutorial
//!
//! A model is a Hugging Face folder: `config.json`, `*.safetensors`, `tokenizer.json`. This one comes with the sources.
//! [`Engine`] loads it onto as many ranks as one likes, each a device of its own with its share of the experts, and takes
//! requests from any thread:
//!
//! ```
//! use exflow::engine::NoProgress;
//! use exflow::{ClusterOptions, Engine, EngineOptions, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! exflow::engine::prepare_process(2); // before any thread exists
//! let mut options = ClusterOptions::new("examples/models/gpt-moe-16e");
//! options.ranks = 2;
//! let engine = Engine::start(options, EngineOptions::default(), &NoProgress)?;
//!
//! // Tokens come as they are made; dropping what `submit` gave ends the request.
//! let prompt_ids = engine.text().expect("a tokenizer").encode("In the beginning")?;
//! let request = Request { prompt_ids, max_tokens: 12, ..Request::default() };
//! let mut text = String::new();
//! for event in engine.submit(request)? {
//!     text += &event?.text;
//! }
//! assert!(!text.is_empty());
//!
//! // What it does right now, and did since its start.
//! let live = engine.live();
//! assert_eq!((live.running, live.requests.finished), (0, 1));
//! # Ok(())
//! # }
//! ```
//!
//! Where a whole batch is to be run and measured, [`Cluster`] is the nearer one. The text does not depend on the
//! number of ranks, on where the experts are, or on how tokens travel; bytes and exchanges do:
//!
//! ```
//! use exflow::engine::{NoProgress, Strategy};
//! use exflow::{Cluster, ClusterOptions, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # exflow::engine::prepare_process(4);
//! let mut texts = Vec::new();
//! for (strategy, exchanges) in [(Strategy::Vanilla, 2.0), (Strategy::Coherent, 1.0)] {
//!     let mut options = ClusterOptions::new("examples/models/gpt-moe-16e");
//!     options.ranks = 4;
//!     options.strategy = strategy;
//!     let mut cluster = Cluster::start(options, &NoProgress)?;
//!     let prompt_ids = cluster.text()?.encode("The king said")?;
//!     let request = Request { prompt_ids, max_tokens: 8, ..Request::default() };
//!     let run = cluster.generate(&[request], &mut |_| {})?;
//!     assert_eq!(run.stats.exchanges_per_layer, exchanges);
//!     texts.push(run.sequences[0].text.clone());
//! }
//! assert_eq!(texts[0], texts[1]);
//! # Ok(())
//! # }
//! ```
//!
//! A placement that keeps followers together comes from routes: those of a model ([`Cluster::profile`]) or a trace on
//! disk. No GPU is needed to solve and judge one:
//!
//! ```
//! use exflow::placement::{Affinity, Generator, SolveOptions, Topology, score_trace, solve};
//! use exflow::PlacementTable;
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Routes of an invented model: 6 MoE layers of 16 experts, top-1. `[tokens, layers]`.
//! let trace = Generator::new(6, 16, 1).trace(2000, 1, 2);
//! let affinity = Affinity::from_trace(&trace.slice(0..1000), 16)?;
//! let options = SolveOptions { time_limit: Duration::from_millis(300), ..SolveOptions::default() };
//! let table = solve(&affinity, &Topology::uniform(4), &options, &mut |_| {})?;
//!
//! // Judged on tokens that were not profiled, beside the placement that one gets for nothing.
//! let later = trace.slice(1000..2000);
//! let stays = |table: &PlacementTable| score_trace(table, &later).stay_rate;
//! assert!(stays(&table) > stays(&PlacementTable::round_robin(6, 16, 4)));
//! # Ok(())
//! # }
//! ```
//!
//! `ClusterOptions::placement` takes such a table. Errors name what, where and what to do; [`engine::EngineError::is_input`]
//! tells bad input from failures at run time.
//!
//! # Modules
//!
//! [`engine`] runs models, [`placement`] counts affinity and solves placements, [`transport`] joins ranks,
//! [`shaders`] holds the kernels. [`study`] compares strategies and placements, and [`report`] draws what it found. With the feature `server`
//! (on by default), `serve` is the OpenAI-compatible server.

pub use exflow_engine as engine;
pub use exflow_placement as placement;
pub use exflow_shaders as shaders;
pub use exflow_transport as transport;

pub use engine::{Cluster, ClusterOptions, Engine, EngineOptions, Request};
pub use placement::PlacementTable;

pub mod fidelity;
pub mod hub;
#[cfg(any(test, feature = "hub"))]
mod os;
pub mod progress;
pub mod report;
#[cfg(feature = "server")]
pub mod serve;
pub mod stream;
pub mod study;

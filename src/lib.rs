//! Mixture-of-Experts language models with their experts spread over several GPUs, over ordinary networks.
//!
//! A token is sent once per MoE layer, to the rank that holds its expert, and stays there (*context-coherent
//! expert parallelism*); experts that follow one another are placed on the same rank (*inter-layer expert
//! affinity*). Both ideas are of "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts
//! Model Inference" (arXiv 2401.08383).
//!
//! ```no_run
//! use exflow::{Cluster, ClusterOptions, Request};
//! use exflow::engine::NoProgress;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! exflow::engine::prepare_process(4); // before any thread exists
//! let mut options = ClusterOptions::new("examples/models/gpt-moe-16e");
//! options.ranks = 4;
//! let mut cluster = Cluster::start(options, &NoProgress)?;
//! let prompt_ids = cluster.text()?.encode("In the beginning")?;
//! let request = Request { prompt_ids, max_tokens: 40, ignore_eos: false, ..Request::default() };
//! let run = cluster.generate(&[request], &mut |event| eprint!("{}", event.text))?;
//! assert!(run.sequences[0].output_ids.len() <= 40);
//! # Ok(())
//! # }
//! ```
//!
//! [`engine`] runs models, [`placement`] counts affinity and solves placements, [`transport`] joins ranks,
//! [`shaders`] holds the kernels. [`study`] compares strategies and placements, and [`report`] draws what it found.

pub use exflow_engine as engine;
pub use exflow_placement as placement;
pub use exflow_shaders as shaders;
pub use exflow_transport as transport;

pub use engine::{Cluster, ClusterOptions, Engine, EngineOptions, Request};
pub use placement::PlacementTable;

pub mod fidelity;
pub mod hub;
pub mod progress;
pub mod report;
#[cfg(feature = "server")]
pub mod serve;
pub mod stream;
pub mod study;

//! The counts that a placement is made from: affinity files, merged and mixed, or a trace.

use super::super::failure::Failure;
use exflow::placement::{Affinity, RoutingTrace};
use exflow::study::load_affinity;
use std::path::{Path, PathBuf};

/// Counts or the trace to count, one of the two.
#[derive(Debug, clap::Args)]
pub(super) struct CountsFlags {
    /// Affinity of `exflow profile`, several are merged; or logical_count JSON of vLLM or SGLang
    #[arg(long, value_name = "A.npz", num_args = 1.., conflicts_with = "trace")]
    affinity: Vec<PathBuf>,
    /// Weight of each affinity file [default: as many tokens as it has]
    #[arg(long, value_name = "W", num_args = 1.., requires = "affinity")]
    mix: Vec<f64>,
    /// Routing trace of `exflow profile`, or any int array [tokens, layers]
    #[arg(long, value_name = "T.npy")]
    trace: Option<PathBuf>,
    /// Tokens to score on that were not profiled [default: a fifth of the counts is kept back]
    #[arg(long, value_name = "T.npy")]
    held_out: Option<PathBuf>,
    /// Experts per layer, where a trace or a table does not tell
    #[arg(long, value_name = "E", conflicts_with = "affinity")]
    pub(super) experts: Option<usize>,
}

/// What was read.
pub(super) struct Counts {
    pub(super) affinity: Affinity,
    pub(super) trace: Option<RoutingTrace>,
    pub(super) held_out: Option<Affinity>,
    /// Digest of the model that was profiled, where it is known.
    pub(super) digest: Option<String>,
    /// Where the counts come from.
    pub(super) source: String,
}

impl Counts {
    /// None where neither affinity nor trace is given.
    pub(super) fn load(flags: &CountsFlags) -> Result<Option<Self>, Failure> {
        let mut counts = match (&flags.trace, flags.affinity.is_empty()) {
            (Some(path), _) => Self::from_trace(path, flags.experts)?,
            (None, false) => Self::merged(&flags.affinity, &flags.mix)?,
            (None, true) => return Ok(None),
        };
        if let Some(path) = &flags.held_out {
            let trace = read_trace(path)?;
            if trace.layers() != counts.affinity.layers {
                return Err(Failure::Input(format!(
                    "{}: {} MoE layers, the profile has {}; give a trace of the same model",
                    path.display(),
                    trace.layers(),
                    counts.affinity.layers
                )));
            }
            counts.held_out = Some(Affinity::from_trace(&trace, counts.affinity.experts)?);
        }
        Ok(Some(counts))
    }

    fn from_trace(path: &Path, experts: Option<usize>) -> Result<Self, Failure> {
        let trace = read_trace(path)?;
        let affinity = Affinity::from_trace(&trace, experts.unwrap_or_else(|| trace.experts()))?;
        let source = path.display().to_string();
        Ok(Self { affinity, trace: Some(trace), held_out: None, digest: None, source })
    }

    fn merged(paths: &[PathBuf], mix: &[f64]) -> Result<Self, Failure> {
        if !mix.is_empty() && mix.len() != paths.len() {
            return Err(Failure::Input(format!(
                "--mix has {} weights for {} affinity files; give one for each",
                mix.len(),
                paths.len()
            )));
        }
        if let Some(weight) = mix.iter().find(|weight| !(**weight > 0.0 && weight.is_finite())) {
            return Err(Failure::Input(format!("--mix {weight}: give a number above 0")));
        }
        let mut files = paths.iter().map(|path| read_counts(path)).collect::<Result<Vec<_>, _>>()?;
        // Weights say how much each text shall count, however long it was; the tokens of all stay as many.
        let tokens: f64 = files.iter().map(|(affinity, _)| affinity.tokens()).sum();
        let weights: f64 = mix.iter().sum();
        for ((affinity, _), weight) in files.iter_mut().zip(mix) {
            affinity.scale(weight / weights * tokens / affinity.tokens().max(1.0));
        }
        let mut whole: Option<(Affinity, Option<String>)> = None;
        for (path, (affinity, digest)) in paths.iter().zip(files) {
            whole = Some(match whole {
                None => (affinity, digest),
                Some((mut sum, known)) => {
                    if let (Some(a), Some(b)) = (&known, &digest)
                        && a != b
                    {
                        return Err(Failure::Input(format!(
                            "{}: profiled on another model than {}; merge profiles of one model",
                            path.display(),
                            paths[0].display()
                        )));
                    }
                    sum.merge(&affinity, 1.0)
                        .map_err(|error| Failure::Input(named(path, &error.to_string())))?;
                    (sum, known.or(digest))
                }
            });
        }
        let Some((affinity, digest)) = whole else {
            return Err(Failure::Input("--affinity names no file; give one".into()));
        };
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        Ok(Self { affinity, trace: None, held_out: None, digest, source: names.join(" + ") })
    }
}

fn advice(path: &Path, error: &str) -> Failure {
    Failure::Input(format!("{}; make one with `exflow profile`", named(path, error)))
}

fn read_trace(path: &Path) -> Result<RoutingTrace, Failure> {
    let trace = RoutingTrace::load_npy(path).map_err(|error| advice(path, &error.to_string()))?;
    if trace.tokens() == 0 {
        return Err(advice(path, "an empty trace"));
    }
    Ok(trace)
}

fn read_counts(path: &Path) -> Result<(Affinity, Option<String>), Failure> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        return Affinity::load_logical_count(path)
            .map(|affinity| (affinity, None))
            .map_err(|error| Failure::Input(named(path, &error.to_string())));
    }
    load_affinity(path).map_err(|error| advice(path, &error.to_string()))
}

/// The message, with the file in front where it does not name it.
fn named(path: &Path, message: &str) -> String {
    let name = path.display().to_string();
    if message.contains(&name) { message.to_owned() } else { format!("{name}: {message}") }
}

//! `exflow profile`: routes of text, as a trace and as affinity counts.

use super::failure::Failure;
use super::flags::{self, RankFlags};
use super::output;
use exflow::placement::Affinity;
use exflow::progress::Bars;
use exflow::study::{passages, save_affinity};
use std::path::PathBuf;

/// Records which experts the tokens of a text choose, for `exflow place`
#[derive(Debug, clap::Args)]
#[command(after_help = "The files hold expert ids and counts, no text.\n\n\
                        Example:\n  exflow profile -m examples/models/gpt-moe-16e --text README.md --trace trace.npy --affinity affinity.npz")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Text files
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Routing trace to write: int32 [tokens, layers] or [tokens, layers, k]
    #[arg(long, value_name = "T.npy")]
    trace: Option<PathBuf>,
    /// Affinity to write: transitions, wrap, load and, for top-k, coactivation
    #[arg(long, value_name = "A.npz", required_unless_present = "trace")]
    affinity: Option<PathBuf>,
    /// Most tokens of one context [default: 256, or the model's longest if that is less]
    #[arg(long, value_name = "N")]
    passage: Option<usize>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let texts = args.text.iter().map(|path| flags::read_text(path)).collect::<Result<Vec<_>, _>>()?;
    for out in args.trace.iter().chain(&args.affinity) {
        flags::check_out(out)?;
    }
    let bars = Bars::new();
    let Some(mut cluster) = args.ranks.start(&bars)? else { return Ok(()) };
    let mut sequences = Vec::new();
    for text in &texts {
        let ids = cluster.text()?.encode(text)?;
        sequences.extend(passages(&ids, args.passage.unwrap_or(256), cluster.spec()));
    }
    if sequences.is_empty() {
        return Err(Failure::Input("the text files hold no text to profile; give longer ones".into()));
    }
    let trace = cluster.profile(&sequences, &bars)?;
    if let Some(path) = &args.trace {
        trace.save_npy(path)?;
    }
    if let Some(path) = &args.affinity {
        let affinity = Affinity::from_trace(&trace, cluster.spec().experts)?;
        save_affinity(path, &affinity, &cluster.spec().digest)?;
    }
    let written: Vec<String> =
        args.trace.iter().chain(&args.affinity).map(|p| p.display().to_string()).collect();
    output::note(&format!(
        "{} tokens in {} passages, {} MoE layers: {}",
        trace.tokens(),
        sequences.len(),
        trace.layers(),
        written.join(", ")
    ));
    Ok(())
}

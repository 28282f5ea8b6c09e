//! `exflow eval`: how well a model predicts a text, and what another type of weights changes.

use super::failure::Failure;
use super::flags::{self, DtypeFlag, RankFlags};
use super::output::{self, Format};
use exflow::engine::{Cluster, Feed, Progress};
use exflow::fidelity::{DivergenceSum, PredictionSum};
use exflow::progress::Bars;
use exflow::study::passages;
use serde_json::json;
use std::path::PathBuf;

/// Perplexity of a text, and the divergence of two types of weights
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow eval -m examples/models/gpt-moe-16e --text README.md --dtype f16 --against f32"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Text files
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Tokens of one context
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    /// The type of weights that the divergence is measured from
    #[arg(long, value_enum)]
    against: Option<DtypeFlag>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let texts = args.text.iter().map(|path| flags::read_text(path)).collect::<Result<Vec<_>, _>>()?;
    let bars = Bars::new();
    let mut cluster = Cluster::start(args.ranks.options(), &bars)?;
    let mut contexts = Vec::new();
    for text in &texts {
        let ids = cluster.text()?.encode(text)?;
        contexts.extend(passages(&ids, args.window as usize, cluster.spec()));
    }
    contexts.retain(|ids| ids.len() > 1);
    if contexts.is_empty() {
        return Err(Failure::Input("the text files hold no text to predict; give longer ones".into()));
    }
    let mut reference = match args.against {
        Some(dtype) => {
            let mut options = args.ranks.options();
            options.dtype = dtype.into();
            Some(Cluster::start(options, &bars)?)
        }
        None => None,
    };
    let vocab = cluster.spec().vocab_size;
    let total = contexts.iter().map(|ids| ids.len() as u64).sum();
    let (mut done, mut prediction, mut divergence) = (0, PredictionSum::default(), DivergenceSum::default());
    for ids in &contexts {
        let logits = cluster.logits(ids, Feed::Prefill)?.logits;
        prediction.add(ids, &logits, vocab);
        if let Some(reference) = &mut reference {
            divergence.add(&reference.logits(ids, Feed::Prefill)?.logits, &logits, vocab);
        }
        done += ids.len() as u64;
        bars.update("predict", done, total, "tokens");
    }
    let prediction = prediction.mean();
    let divergence = reference.is_some().then(|| divergence.result());
    match args.format {
        Format::Json => output::json(&json!({ "prediction": prediction, "divergence": divergence })),
        Format::Text => {
            let mut text = format!(
                "perplexity {:.3} ({:.4} nats a token, {} tokens in contexts of {})\n",
                prediction.perplexity, prediction.nats_per_token, prediction.tokens, args.window
            );
            if let Some(d) = divergence {
                text += &format!(
                    "divergence: mean {:.2e} nats, worst {:.2e}, same likeliest token {:.2} %\n",
                    d.mean_kl,
                    d.max_kl,
                    100.0 * d.same_top
                );
            }
            output::text(&text)
        }
    }
}

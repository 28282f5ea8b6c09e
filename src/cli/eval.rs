//! `exflow eval`: how well a model predicts a text, and what another setting changes.

use super::failure::Failure;
use super::flags::{self, RankFlags};
use super::output::{self, Format};
use exflow::engine::{
    Cluster, ClusterOptions, Combine, Dtype, EngineError, Feed, KvDtype, Numerics, Progress, Quant,
};
use exflow::fidelity::{DivergenceSum, Prediction, PredictionSum};
use exflow::progress::Bars;
use exflow::study::passages;
use serde_json::json;
use std::path::PathBuf;

/// Perplexity of a text, and the divergence of two settings
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow eval -m examples/models/gpt-moe-16e --text README.md --dtype f16 --against dtype=f32"
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
    /// The setting that the divergence is measured from: what differs in it, of dtype, quant, numerics, kv-dtype, combine and
    /// ep-size
    #[arg(long, value_name = "dtype=f32,...", value_parser = other_setting)]
    against: Option<Other>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// What differs in the setting that is compared with.
type Other = Vec<Change>;

#[derive(Debug, Clone, Copy)]
enum Change {
    Dtype(Dtype),
    Quant(Option<Quant>),
    Numerics(Numerics),
    KvDtype(KvDtype),
    Combine(Combine),
    Ranks(usize),
}

fn other_setting(text: &str) -> Result<Other, String> {
    text.split(',').map(|pair| change(pair.trim())).collect()
}

fn change(pair: &str) -> Result<Change, String> {
    let (key, value) = pair.split_once('=').unwrap_or(("dtype", pair));
    let engine = |e: EngineError| e.to_string();
    match key {
        "dtype" => value.parse().map(Change::Dtype).map_err(engine),
        "quant" if value == "none" => Ok(Change::Quant(None)),
        "quant" => value.parse().map(|quant| Change::Quant(Some(quant))).map_err(engine),
        "numerics" => value.parse().map(Change::Numerics).map_err(engine),
        "kv-dtype" => value.parse().map(Change::KvDtype).map_err(engine),
        "combine" => value.parse().map(Change::Combine).map_err(engine),
        "ep-size" => flags::ranks(value).map(Change::Ranks),
        _ => Err(format!(
            "{key:?} is no setting; use dtype, quant, numerics, kv-dtype, combine or ep-size, as in dtype=f32"
        )),
    }
}

impl Change {
    fn apply(self, options: &mut ClusterOptions) {
        match self {
            Self::Dtype(dtype) => options.dtype = dtype,
            Self::Quant(quant) => options.quant = quant,
            Self::Numerics(numerics) => options.numerics = numerics,
            Self::KvDtype(dtype) => options.kv_dtype = dtype,
            Self::Combine(combine) => options.combine = combine,
            Self::Ranks(ranks) => options.ranks = ranks,
        }
    }
}

/// How both settings predict the text, and how far the first is from the other.
#[derive(Default)]
struct Sums {
    first: PredictionSum,
    other: PredictionSum,
    divergence: DivergenceSum,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let texts = args.text.iter().map(|path| flags::read_text(path)).collect::<Result<Vec<_>, _>>()?;
    let bars = Bars::new();
    let Some(mut cluster) = args.ranks.start(&bars)? else { return Ok(()) };
    let mut contexts = Vec::new();
    for text in &texts {
        let ids = cluster.text()?.encode(text)?;
        contexts.extend(passages(&ids, args.window as usize, cluster.spec()));
    }
    contexts.retain(|ids| ids.len() > 1);
    if contexts.is_empty() {
        return Err(Failure::Input("the text files hold no text to predict; give longer ones".into()));
    }
    let mut other = match &args.against {
        Some(changes) => {
            let mut options = args.ranks.options()?;
            changes.iter().for_each(|change| change.apply(&mut options));
            Some(Cluster::start(options, &bars)?)
        }
        None => None,
    };
    let vocab = cluster.spec().vocab_size;
    let total = contexts.iter().map(|ids| ids.len() as u64).sum();
    let (mut done, mut sums) = (0, Sums::default());
    for ids in &contexts {
        let logits = cluster.logits(ids, Feed::Prefill)?.logits;
        sums.first.add(ids, &logits, vocab);
        if let Some(other) = &mut other {
            let reference = other.logits(ids, Feed::Prefill)?.logits;
            sums.other.add(ids, &reference, vocab);
            sums.divergence.add(&reference, &logits, vocab);
        }
        done += ids.len() as u64;
        bars.update("predict", done, total, "tokens");
    }
    match args.format {
        Format::Json => {
            let compared = other.is_some();
            output::json(&json!({
                "prediction": sums.first.mean(),
                "against": compared.then(|| sums.other.mean()),
                "divergence": compared.then(|| sums.divergence.result()),
            }))
        }
        Format::Text => output::text(&report(args, &sums, other.is_some())),
    }
}

fn report(args: &Args, sums: &Sums, compared: bool) -> String {
    let line = |p: Prediction| {
        format!(
            "perplexity {:.3} ({:.4} nats a token, {} tokens in contexts of {})",
            p.perplexity, p.nats_per_token, p.tokens, args.window
        )
    };
    let mut text = format!("{}\n", line(sums.first.mean()));
    if compared {
        let d = sums.divergence.result();
        text += &format!("against    {}\n", line(sums.other.mean()).trim_start_matches("perplexity "));
        text += &format!(
            "divergence: mean {:.2e} nats, worst {:.2e}, same likeliest token {:.2} %\n",
            d.mean_kl,
            d.max_kl,
            100.0 * d.same_top
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_as_typed() {
        let mut options = ClusterOptions::new("model");
        for change in other_setting("dtype=f16, ep-size=3,combine=sum").expect("three changes") {
            change.apply(&mut options);
        }
        assert_eq!((options.dtype, options.ranks, options.combine), (Dtype::F16, 3, Combine::Sum));
        assert!(matches!(other_setting("f16").as_deref(), Ok([Change::Dtype(Dtype::F16)])));
        for wrong in ["", "dtype", "dtype=f12", "ep-size=0", "colour=red", "dtype=f16,"] {
            assert!(other_setting(wrong).is_err(), "{wrong}");
        }
    }
}

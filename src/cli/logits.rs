//! `exflow logits`: logits and routes of every position, as `.npz`.

use super::failure::Failure;
use super::flags::{self, RankFlags};
use super::output;
use clap::ValueEnum;
use exflow::engine::Feed;
use exflow::progress::Bars;
use std::path::PathBuf;

/// Writes the logits and the routes of given ids
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The archive: logits f32 [T,V]; for each MoE layer l, by the model's own number, experts.l i32 [T,K]\n\
                        (largest weight first) and router_weights.l f32 [T,K].\n\n\
                        Example:\n  exflow logits -m examples/models/gpt-moe-16e --prompt-ids 1,2,3 --out logits.npz --feed decode --ep-size 2"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// The ids
    #[arg(long, value_name = "1,2,3")]
    prompt_ids: String,
    /// The archive to write
    #[arg(long, value_name = "F.npz")]
    out: PathBuf,
    /// prefill: all at once; decode: the first id is prefilled, each further one is a decode step
    #[arg(long, value_enum, default_value = "prefill")]
    feed: FeedFlag,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FeedFlag {
    Prefill,
    Decode,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let ids = flags::token_ids(&args.prompt_ids)?;
    flags::check_out(&args.out)?;
    let Some(mut cluster) = args.ranks.start(&Bars::terminal_only())? else { return Ok(()) };
    let feed = match args.feed {
        FeedFlag::Prefill => Feed::Prefill,
        FeedFlag::Decode => Feed::Decode,
    };
    let dump = cluster.logits(&ids, feed)?;
    dump.save_npz(&args.out)?;
    args.ranks.note_placement();
    output::note(&format!(
        "{} positions × {} logits, routes of {} MoE layers: {}",
        dump.tokens,
        dump.vocab,
        dump.layers.len(),
        args.out.display()
    ));
    Ok(())
}

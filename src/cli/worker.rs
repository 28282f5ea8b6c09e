//! `exflow worker`: this process's ranks in a group that another process leads.

use super::failure::Failure;
use super::flags::group::GroupFlags;
use exflow::engine::{ClusterOptions, PlacementSource};
use exflow::progress::Bars;
use exflow::transport::link::LinkSpec;
use std::path::PathBuf;

/// Runs ranks for rank 0, which is another process, here or on another host
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Rank 0 runs generate, logits, eval or profile with the same --world-size, --leader and --identity. \
                        Its choices (strategy, placement, types) reach every worker; ends when rank 0 ends.\n\n\
                        Example:\n  exflow worker -m DIR --rank 2 --world-size 4 --leader node0:7447 --identity certs"
)]
pub(crate) struct Args {
    /// Model folder: config.json, *.safetensors, tokenizer.json
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    group: GroupFlags,
    /// Shapes what this process sends: lan, wifi, wan, or latency=5ms,rate=100mbit,loss=0.1%,seed=1
    #[arg(long, value_name = "LINK", value_parser = super::flags::link)]
    link: Option<LinkSpec>,
    /// A table that rank 0's must be equal to [default: rank 0's, whatever it is]
    #[arg(long, value_name = "FILE")]
    placement: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut options = ClusterOptions::new(&args.model);
    if let Some(path) = &args.placement {
        options.placement = PlacementSource::File(path.clone());
    }
    options.link = args.link;
    args.group.apply(&mut options)?;
    if options.group.is_none() {
        return Err(Failure::Input(
            "a worker needs --rank, --world-size and --leader, or a launcher that tells them".into(),
        ));
    }
    Ok(exflow::engine::work(options, &Bars::new())?)
}

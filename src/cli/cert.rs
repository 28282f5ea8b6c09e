//! `exflow cert`: who may join a cluster.

use super::failure::Failure;
use super::output;
use clap::Subcommand;
use exflow::placement::Rank;
use exflow::transport::identity::{ClusterAuthority, Identity};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Makes the certificates that decide who may join a cluster
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Keys are readable by their owner only. Keep authority.key off the hosts that run ranks; give each host the\n\
                        folder of its own rank.\n\n\
                        Example:\n  exflow cert init cluster && exflow cert issue cluster --rank 0 && exflow cert issue cluster --rank 1\n  \
                        exflow cert pin rank-0 --rank 0 && exflow cert pin rank-1 --rank 1 && exflow cert trust rank-0 rank-1"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Makes a cluster's authority: DIR/authority.crt and DIR/authority.key
    #[command(after_help = "Example:\n  exflow cert init cluster")]
    Init {
        /// Folder of the authority
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Issues the identity of a rank from the authority of DIR
    #[command(after_help = "Example:\n  exflow cert issue cluster --rank 0 --days 30 -o rank-0")]
    Issue {
        /// Folder of the authority
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Rank that the identity is bound to (the first of a process with several)
        #[arg(long, value_name = "R")]
        rank: u16,
        /// Days for which it is valid
        #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
        /// Folder to write [default: DIR/rank-R]
        #[arg(short, long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Makes an identity without an authority, for a handful of hosts that pin each other
    #[command(after_help = "Example:\n  exflow cert pin rank-0 --rank 0")]
    Pin {
        /// Folder to write
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Rank that the identity is bound to
        #[arg(long, value_name = "R")]
        rank: u16,
    },
    /// Lets identities made by `pin` trust exactly one another: writes pins.txt into each folder
    #[command(after_help = "Example:\n  exflow cert trust rank-0 rank-1")]
    Trust {
        /// Folders of the identities
        #[arg(value_name = "DIR", num_args = 2.., required = true)]
        folders: Vec<PathBuf>,
    },
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.task {
        Task::Init { folder } => {
            ClusterAuthority::init(folder)?;
            output::text(&format!("{}\n", folder.join("authority.crt").display()))
        }
        Task::Issue { folder, rank, days, out } => {
            let authority = ClusterAuthority::load(folder)?;
            let path = out.clone().unwrap_or_else(|| folder.join(format!("rank-{rank}")));
            let validity = Duration::from_secs(u64::from(*days) * 24 * 3600);
            authority.issue(Rank(*rank), validity)?.save(&path)?;
            tell(&path)
        }
        Task::Pin { folder, rank } => {
            Identity::self_signed(Rank(*rank))?.save(folder)?;
            tell(folder)
        }
        Task::Trust { folders } => trust(folders),
    }
}

/// Prints the folder and the fingerprint that others may pin.
fn tell(folder: &Path) -> Result<(), Failure> {
    output::text(&format!("{} {}\n", folder.display(), Identity::load(folder)?.fingerprint_text()))
}

fn trust(folders: &[PathBuf]) -> Result<(), Failure> {
    let identities = folders.iter().map(|folder| Identity::load(folder)).collect::<Result<Vec<_>, _>>()?;
    let pins: Vec<_> = folders
        .iter()
        .zip(&identities)
        .map(|(folder, identity)| match identity.named_rank() {
            Some(rank) => Ok((rank, identity.fingerprint())),
            None => Err(Failure::Input(format!(
                "{}: its certificate names no rank; make it with `exflow cert pin DIR --rank R`",
                folder.display()
            ))),
        })
        .collect::<Result<_, _>>()?;
    for (folder, identity) in folders.iter().zip(identities) {
        identity.pin(pins.clone()).save(folder)?;
    }
    output::text(&format!("{} identities trust one another\n", folders.len()))
}

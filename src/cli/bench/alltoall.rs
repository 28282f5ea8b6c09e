//! `exflow bench alltoall`: what an exchange costs, against plain TCP and MPI in the same run.

use super::super::failure::Failure;
use super::super::flags;
use super::super::output::{self, Format};
use exflow::placement::Rank;
use exflow::transport::bench::{self, MpiLaunch, Order, Point};
use exflow::transport::identity::Identity;
use exflow::transport::launch;
use exflow::transport::link::LinkSpec;
use exflow::transport::quic::{Congestion, JoinOptions, QuicOptions, link_lateness};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Measures the all-to-all over QUIC and, interleaved, over plain TCP, MPI and quinn's defaults
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Time runs from a barrier to the last byte on the slowest rank; goodput is what one rank receives over the\n\
                        median. The quinn and mpi rows come with --quinn-defaults and --mpi.\n\n\
                        Example:\n  exflow bench alltoall --loopback --ranks 4 --format json\n  \
                        exflow bench alltoall --rank 1 --world-size 4 --leader 10.0.0.1:7447 --identity rank-1"
)]
pub(crate) struct Args {
    /// All ranks in this process, over the loopback interface
    #[arg(long, conflicts_with_all = ["rank", "world_size", "leader", "identity", "listen"])]
    loopback: bool,
    /// Ranks of --loopback
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = flags::ranks)]
    ranks: usize,
    /// This process's rank, one process per host [default: from the launcher's environment]
    #[arg(long, value_name = "R")]
    rank: Option<u16>,
    /// Ranks of all hosts together [default: from the launcher's environment]
    #[arg(long, value_name = "N", value_parser = flags::ranks)]
    world_size: Option<usize>,
    /// Where rank 0 listens
    #[arg(long, value_name = "HOST:PORT")]
    leader: Option<String>,
    /// UDP address to listen on; the next port too with --quinn-defaults [default: rank 0: the leader's port, others: any]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// Folder of this rank's certificate and key, from `exflow cert issue`
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// Bytes per peer, separated by commas
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_values_t = bench::SIZES)]
    sizes: Vec<usize>,
    /// Turns that each transport takes per size
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Bytes in flight per peer, for private links [default: 1 MiB with --loopback; else as many as keep queues at 1 ms,
    /// CUBIC towards public addresses]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(2400..))]
    window: Option<u64>,
    /// Largest UDP payload to look for, bytes [default: that of the driver]
    #[arg(long, value_name = "BYTES")]
    udp_payload: Option<u16>,
    /// Shapes what each rank sends: lan, wifi, wan, or as in latency=5ms,rate=100mbit,loss=0.1%,seed=1
    #[arg(long, value_name = "SPEC")]
    link: Option<LinkSpec>,
    /// Also with quinn's default settings
    #[arg(long)]
    quinn_defaults: bool,
    /// Also with MPI_Alltoallv (needs mpicc and mpirun)
    #[arg(long)]
    mpi: bool,
    /// Launcher of the MPI program and its arguments [default: mpirun over TCP]
    #[arg(long, value_name = "COMMAND", requires = "mpi")]
    mpirun: Option<String>,
    /// Also while every rank sends every other one bulk
    #[arg(long)]
    beside_bulk: bool,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let order = args.order();
    if let Some(link) = &order.quic.link {
        output::note(&format!("link: {link}, each rank's outgoing UDP; tcp and mpi rows are not shaped"));
        if let Ok([p50, p99]) = link_lateness(link.latency) {
            let [p50, p99] = [p50, p99].map(|late| late.as_micros());
            output::note(&format!(
                "its delay is met within {p50} us (median), {p99} us (p99) on this machine now"
            ));
        }
    }
    let points = if args.loopback {
        bench::loopback(args.ranks, &order)
    } else {
        bench::between_hosts(args.join(&order)?, &order)
    };
    let points = points?;
    match args.format {
        _ if points.is_empty() => Ok(()), // Rank 0 of the hosts writes the result.
        Format::Json => output::json(&points),
        Format::Text => output::text(&(bench::table(&points) + &ratios(&points))),
    }
}

impl Args {
    fn order(&self) -> Order {
        let mut quic = if self.loopback { QuicOptions::loopback() } else { QuicOptions::default() };
        quic.link = self.link;
        if let Some(window_bytes) = self.window {
            quic.congestion = Congestion::Bounded { window_bytes };
        }
        if let Some(payload) = self.udp_payload {
            quic.max_udp_payload = payload;
        }
        let launcher = self.mpirun.as_ref().map(|text| text.split_whitespace().map(String::from).collect());
        let mpi =
            MpiLaunch { launcher: launcher.unwrap_or(MpiLaunch::default().launcher), ..MpiLaunch::default() };
        Order {
            sizes: self.sizes.clone(),
            turns: self.repeats as usize,
            quic,
            quinn_defaults: self.quinn_defaults,
            mpi: self.mpi.then_some(mpi),
            beside_bulk: self.beside_bulk,
        }
    }

    /// How this process's rank joins the others.
    fn join(&self, order: &Order) -> Result<JoinOptions, Failure> {
        let launched = launch::detect(|name| std::env::var(name).ok())?;
        let missing = |what: &str| {
            Failure::Input(format!(
                "bench alltoall: {what} is missing; give it, or --loopback for one process"
            ))
        };
        let rank =
            self.rank.map(Rank).or(launched.as_ref().map(|l| l.rank)).ok_or_else(|| missing("--rank"))?;
        let ranks = self.world_size.or(launched.as_ref().map(|l| l.world_size));
        let ranks = ranks.ok_or_else(|| missing("--world-size"))?;
        let identity = self.identity.as_ref().ok_or_else(|| missing("--identity"))?;
        let leader = self.leader.clone().or(launched.and_then(|l| l.leader));
        let mut join = JoinOptions::new(rank, ranks, Identity::load(identity)?);
        join.quic = order.quic.clone();
        join.listen = self.listen.unwrap_or_else(|| {
            let port = leader.as_deref().and_then(|at| at.rsplit_once(':')?.1.parse().ok());
            let port = port.filter(|_| rank == Rank(0)).unwrap_or(0);
            SocketAddr::from(([0, 0, 0, 0], port))
        });
        join.leader = leader;
        Ok(join)
    }
}

/// QUIC against the others, at each size.
fn ratios(points: &[Point]) -> String {
    let mut text = String::new();
    for quic in points.iter().filter(|point| point.transport == "quic" && !point.beside_bulk) {
        let others = points.iter().filter(|other| {
            other.bytes_per_peer == quic.bytes_per_peer && other.transport != "quic" && other.p50_us > 0.0
        });
        for other in others {
            let cpu = quic.cpu_ns_per_byte.zip(other.cpu_ns_per_byte).filter(|(_, theirs)| *theirs > 0.0);
            let cpu = cpu.map_or_else(String::new, |(ours, theirs)| format!(", CPU {:.2}", ours / theirs));
            text += &format!(
                "quic/{} at {} bytes: p50 {:.2}, p99 {:.2}{cpu}\n",
                other.transport,
                quic.bytes_per_peer,
                quic.p50_us / other.p50_us,
                quic.p99_us / other.p99_us.max(1e-3)
            );
        }
    }
    text
}

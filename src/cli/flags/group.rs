//! Flags of a process among others that run one model together.

use super::duration;
use crate::cli::failure::Failure;
use crate::cli::output;
use exflow::engine::{Affinity, ClusterOptions, GroupOptions, Observer, Progress, TransportKind};
use exflow::transport::launch::{self, Launch};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Which process this is, where the others are, and what it brings.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Several processes or hosts")]
pub(crate) struct GroupFlags {
    /// Number of this process; 0 leads [default: what torchrun, Open MPI, PMI, Slurm or Kubernetes says]
    #[arg(long, value_name = "I")]
    rank: Option<u16>,
    /// How many processes there are; each has one rank or several
    #[arg(long, value_name = "N")]
    world_size: Option<usize>,
    /// Where process 0 is reached by the others
    #[arg(long, value_name = "HOST:PORT")]
    leader: Option<String>,
    /// UDP address to listen on [default: every interface, process 0 with the leader's port]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Folder of this process's identity, or one that holds it as rank-I (`exflow cert issue`)
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// Adapters by their numbers in `exflow devices`, a rank on each [default: the best one]
    #[arg(long, value_name = "0,1", value_delimiter = ',')]
    devices: Vec<usize>,
    /// Ranks on each adapter
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    ranks_per_device: usize,
    /// Memory that each rank may take, in place of what the driver says is free: weights first, the KV cache the rest
    #[arg(long, value_name = "10GiB", value_parser = bytes)]
    memory: Option<u64>,
    /// Counts of `exflow profile`, given to process 0: experts of a rank that is lost go where those are that they
    /// follow [default: spread evenly; `exflow serve` counts by itself]
    #[arg(long, value_name = "A.npz")]
    lost_affinity: Option<PathBuf>,
    /// How long the other processes are waited for
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    join_timeout: Duration,
}

impl GroupFlags {
    /// Puts devices, memory and group into the options; says where rank and size come from.
    pub(crate) fn apply(&self, options: &mut ClusterOptions) -> Result<(), Failure> {
        options.memory = self.memory;
        let group = self.group()?;
        let each = |device: &usize| std::iter::repeat_n(device.to_string(), self.ranks_per_device);
        options.devices = self.devices.iter().flat_map(each).collect();
        if group.is_some() {
            options.ranks = options.devices.len().max(self.ranks_per_device);
            options.transport = TransportKind::Quic;
        } else {
            options.ranks = options.ranks.max(options.devices.len());
        }
        if self.lost_affinity.is_some() && group.is_none() {
            return Err(Failure::Input(
                "--lost-affinity says where a lost rank's experts go, and one process loses none; give --rank, --world-size and \
                 --leader, or leave it out"
                    .into(),
            ));
        }
        options.affinity = self.lost_affinity.as_deref().map(read_affinity).transpose()?.map(Arc::new);
        options.group = group;
        Ok(())
    }

    /// Whether flags name a group.
    pub(crate) fn is_told(&self) -> bool {
        self.rank.is_some() || self.world_size.is_some() || self.leader.is_some()
    }

    /// The group that flags or a launcher put this process into; none: it is alone.
    fn group(&self) -> Result<Option<GroupOptions>, Failure> {
        let told = self.rank.is_some() && self.world_size.is_some();
        let launched = match told {
            true => None,
            false => launch::detect(|name| std::env::var(name).ok()).map_err(input)?,
        };
        if !self.is_told() && launched.as_ref().is_none_or(|launch| launch.world_size < 2) {
            return Ok(None);
        }
        let of = |from: fn(&Launch) -> usize| launched.as_ref().map(from);
        let rank = self.rank.map(usize::from).or(of(|l| l.rank.index()));
        let size = self.world_size.or(of(|l| l.world_size));
        let leader = self.leader.clone().or(launched.as_ref().and_then(|l| l.leader.clone()));
        let process = given(rank, "--rank I", "give this process's number, from 0")?;
        let processes = given(size, "--world-size N", "give the number of processes")?;
        let leader =
            given(leader, "--leader HOST:PORT", "say where process 0 is reached, or set EXFLOW_LEADER")?;
        let identity = given(
            self.identity.clone().or(std::env::var_os("EXFLOW_IDENTITY").map(PathBuf::from)),
            "--identity DIR",
            "issue one with `exflow cert`, or set EXFLOW_IDENTITY",
        )?;
        if process >= processes {
            return Err(Failure::Input(format!(
                "process {process} of {processes}: --rank counts from 0; give a number below --world-size"
            )));
        }
        let from = launched.map_or_else(|| "flags".to_owned(), |launch| launch.launcher.to_string());
        output::note(&format!("process {process} of {processes}, process 0 at {leader} (from {from})"));
        Ok(Some(GroupOptions {
            listen: self.listen,
            join_timeout: self.join_timeout,
            observer: Observer::new(move |what| output::note(&format!("process {process}: {what}"))),
            ..GroupOptions::new(process, processes, leader, identity)
        }))
    }
}

/// What to run, where this process leads; one that does not lead serves rank 0 to its end and gives none.
pub(crate) fn led(
    options: ClusterOptions,
    progress: &dyn Progress,
) -> Result<Option<ClusterOptions>, Failure> {
    if options.group.as_ref().is_none_or(|group| group.process == 0) {
        return Ok(Some(options));
    }
    // Its own choices give way to rank 0's.
    let mut worker = ClusterOptions::new(&options.model);
    (worker.devices, worker.ranks, worker.adapter) = (options.devices, options.ranks, options.adapter);
    (worker.memory, worker.group, worker.link) = (options.memory, options.group, options.link);
    exflow::engine::work(worker, progress)?;
    Ok(None)
}

fn read_affinity(path: &Path) -> Result<Affinity, Failure> {
    Affinity::load_npz(path).map_err(|error| Failure::Input(error.to_string()))
}

fn input(error: exflow::transport::TransportError) -> Failure {
    Failure::Input(error.to_string())
}

fn given<T>(value: Option<T>, flag: &str, remedy: &str) -> Result<T, Failure> {
    value.ok_or_else(|| Failure::Input(format!("{flag} is missing for a group of processes; {remedy}")))
}

/// `10GiB`, `500MiB`, `8GB`, or bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let factor = match text[split..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        unit => return Err(format!("unknown unit {unit:?}; use KiB, MiB, GiB, kB, MB or GB")),
    };
    match text[..split].trim().parse::<f64>() {
        Ok(number) if number > 0.0 && (number * factor).is_finite() => Ok((number * factor) as u64),
        _ => Err("give an amount of memory as in 10GiB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_as_typed() {
        assert_eq!(bytes("10GiB"), Ok(10 << 30));
        assert_eq!(
            (bytes("500 mib"), bytes("8GB"), bytes("4096")),
            (Ok(500 << 20), Ok(8_000_000_000), Ok(4096))
        );
        for wrong in ["", "GiB", "-1GiB", "10 apples", "nan"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}

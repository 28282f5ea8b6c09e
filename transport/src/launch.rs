//! Rank, world size and leader from the environment that a launcher sets. The environment is an argument.

use crate::TransportError;
use exflow_placement::Rank;
use std::fmt;

/// UDP port of rank 0 where the launcher names none.
pub const DEFAULT_PORT: u16 = 7447;

/// Who said which rank this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// `EXFLOW_RANK`, `EXFLOW_WORLD_SIZE`, `EXFLOW_LEADER`.
    Exflow,
    /// `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`.
    Torchrun,
    /// `OMPI_COMM_WORLD_RANK`, `OMPI_COMM_WORLD_SIZE`.
    OpenMpi,
    /// `PMI_RANK`, `PMI_SIZE`.
    Pmi,
    /// `SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_STEP_NODELIST`, within a step.
    Slurm,
    /// A pod's ordinal (`JOB_COMPLETION_INDEX` or the end of `HOSTNAME`), with `EXFLOW_WORLD_SIZE`.
    Kubernetes,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exflow => "EXFLOW_RANK",
            Self::Torchrun => "torchrun (RANK)",
            Self::OpenMpi => "Open MPI (OMPI_COMM_WORLD_RANK)",
            Self::Pmi => "PMI (PMI_RANK)",
            Self::Slurm => "Slurm (SLURM_PROCID)",
            Self::Kubernetes => "Kubernetes (pod ordinal)",
        })
    }
}

/// What a launcher said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Who said it.
    pub launcher: Launcher,
    /// This process's rank.
    pub rank: Rank,
    /// How many ranks there are.
    pub world_size: usize,
    /// `HOST:PORT` of rank 0, where the launcher tells.
    pub leader: Option<String>,
    /// Which of its host's processes this is, where the launcher tells.
    pub local_rank: Option<usize>,
}

/// Looks a variable up; empty is as good as missing.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What the first launcher found in the environment said, in the order of [`Launcher`]; `None`: there was none.
///
/// `EXFLOW_LEADER` (`HOST` or `HOST:PORT`) names the leader for every launcher.
pub fn detect(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>, TransportError> {
    let env: Lookup<'_> =
        &|name| lookup(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    for find in [exflow, torchrun, open_mpi, pmi, slurm, kubernetes] {
        if let Some(mut launch) = find(env)? {
            if launch.rank.index() >= launch.world_size {
                let what = format!("{}: rank {} of {}", launch.launcher, launch.rank, launch.world_size);
                return Err(TransportError::Options {
                    what,
                    remedy: "ranks count from 0; check the launcher".into(),
                });
            }
            if let Some(leader) = env("EXFLOW_LEADER") {
                launch.leader = Some(with_port(leader, None));
            }
            return Ok(Some(launch));
        }
    }
    Ok(None)
}

fn exflow(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    named(env, Launcher::Exflow, ["EXFLOW_RANK", "EXFLOW_WORLD_SIZE"], "EXFLOW_LOCAL_RANK")
}

fn torchrun(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    // RANK alone is too common a name.
    if env("MASTER_ADDR").is_none() || env("WORLD_SIZE").is_none() {
        return Ok(None);
    }
    let launch = named(env, Launcher::Torchrun, ["RANK", "WORLD_SIZE"], "LOCAL_RANK")?;
    let leader = env("MASTER_ADDR").map(|host| with_port(host, env("MASTER_PORT")));
    Ok(launch.map(|launch| Launch { leader, ..launch }))
}

fn open_mpi(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    let names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"];
    named(env, Launcher::OpenMpi, names, "OMPI_COMM_WORLD_LOCAL_RANK")
}

fn pmi(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    named(env, Launcher::Pmi, ["PMI_RANK", "PMI_SIZE"], "MPI_LOCALRANKID")
}

fn slurm(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    // A batch script has these variables too, but is not a task of a step.
    if env("SLURM_STEP_ID").is_none() {
        return Ok(None);
    }
    let size = if env("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let launch = named(env, Launcher::Slurm, ["SLURM_PROCID", size], "SLURM_LOCALID")?;
    let nodes = env("SLURM_STEP_NODELIST").or_else(|| env("SLURM_JOB_NODELIST"));
    let leader = nodes.and_then(|nodes| first_node(&nodes)).map(|host| with_port(host, None));
    Ok(launch.map(|launch| Launch { leader, ..launch }))
}

fn kubernetes(env: Lookup<'_>) -> Result<Option<Launch>, TransportError> {
    if env("KUBERNETES_SERVICE_HOST").is_none() {
        return Ok(None);
    }
    let (Some(size), Some(host)) = (env("EXFLOW_WORLD_SIZE"), env("HOSTNAME")) else { return Ok(None) };
    let Some((set, ordinal)) = host.rsplit_once('-') else { return Ok(None) };
    let (name, ordinal) = match env("JOB_COMPLETION_INDEX") {
        Some(index) => ("JOB_COMPLETION_INDEX", index),
        None => ("HOSTNAME", ordinal.to_owned()),
    };
    let leader = env("EXFLOW_SERVICE").map(|service| with_port(format!("{set}-0.{service}"), None));
    Ok(Some(Launch {
        launcher: Launcher::Kubernetes,
        rank: Rank(number(name, &ordinal)?),
        world_size: number("EXFLOW_WORLD_SIZE", &size)?.into(),
        leader,
        local_rank: None,
    }))
}

/// A launcher that names rank and size plainly.
fn named(
    env: Lookup<'_>,
    launcher: Launcher,
    [rank, size]: [&str; 2],
    local: &str,
) -> Result<Option<Launch>, TransportError> {
    let Some(rank_text) = env(rank) else { return Ok(None) };
    let Some(size_text) = env(size) else {
        let what = format!("{rank} is set and {size} is not");
        return Err(TransportError::Options {
            what,
            remedy: "set both, or give --rank and --world-size".into(),
        });
    };
    Ok(Some(Launch {
        launcher,
        rank: Rank(number(rank, &rank_text)?),
        world_size: number(size, &size_text)?.into(),
        leader: None,
        local_rank: env(local).map(|text| number(local, &text)).transpose()?.map(usize::from),
    }))
}

fn number(name: &str, text: &str) -> Result<u16, TransportError> {
    text.parse().map_err(|_| TransportError::Options {
        what: format!("{name}={text} is not a number below 65536"),
        remedy: "check the launcher, or give --rank and --world-size".into(),
    })
}

/// `host:port`; a host that names its port keeps it.
fn with_port(host: String, port: Option<String>) -> String {
    let bare_v6 = host.matches(':').count() > 1 && !host.starts_with('[');
    let has_port = !bare_v6 && host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let port = port.unwrap_or_else(|| DEFAULT_PORT.to_string());
    match (has_port, bare_v6) {
        (true, _) => host,
        (false, true) => format!("[{host}]:{port}"),
        (false, false) => format!("{host}:{port}"),
    }
}

/// First host of a Slurm node list: `gpu[03-05,9],login` gives `gpu03`.
fn first_node(list: &str) -> Option<String> {
    let end = list.find(',').unwrap_or(list.len());
    match list.find('[').filter(|open| *open < end) {
        None => Some(list[..end].to_owned()),
        Some(open) => {
            let close = open + list[open..].find(']')?;
            let first = list[open + 1..close].split([',', '-']).next()?;
            let rest = &list[close + 1..];
            let suffix = &rest[..rest.find(',').unwrap_or(rest.len())];
            Some(format!("{}{first}{suffix}", &list[..open]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect_in(pairs: &[(&str, &str)]) -> Result<Option<Launch>, TransportError> {
        detect(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    fn found(pairs: &[(&str, &str)]) -> (Launcher, u16, usize, Option<String>) {
        let launch = detect_in(pairs).expect("valid").expect("found");
        (launch.launcher, launch.rank.0, launch.world_size, launch.leader)
    }

    #[test]
    fn each_launcher_is_recognised() {
        let torch = [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "head"), ("MASTER_PORT", "29500")];
        assert_eq!(found(&torch), (Launcher::Torchrun, 1, 4, Some("head:29500".into())));
        let mpi = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("EXFLOW_LEADER", "a:1")];
        assert_eq!(found(&mpi), (Launcher::OpenMpi, 3, 4, Some("a:1".into())));
        assert_eq!(found(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), (Launcher::Pmi, 0, 2, None));
        let slurm = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "2"),
            ("SLURM_NTASKS", "3"),
            ("SLURM_JOB_NODELIST", "n[07-9]"),
        ];
        assert_eq!(found(&slurm), (Launcher::Slurm, 2, 3, Some("n07:7447".into())));
        assert_eq!(detect_in(&slurm[1..]).expect("valid"), None);
        let pod = [
            ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
            ("HOSTNAME", "moe-west-2"),
            ("EXFLOW_WORLD_SIZE", "3"),
            ("EXFLOW_SERVICE", "moe"),
        ];
        assert_eq!(found(&pod), (Launcher::Kubernetes, 2, 3, Some("moe-west-0.moe:7447".into())));
        assert_eq!(detect_in(&[("RANK", "1")]).expect("valid"), None);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let error = |pairs: &[(&str, &str)]| detect_in(pairs).expect_err("refused").to_string();
        assert!(error(&[("PMI_RANK", "x"), ("PMI_SIZE", "2")]).contains("PMI_RANK=x"));
        assert!(error(&[("PMI_RANK", "2"), ("PMI_SIZE", "2")]).contains("rank 2 of 2"));
        assert!(error(&[("EXFLOW_RANK", "0")]).contains("EXFLOW_WORLD_SIZE"));
    }

    #[test]
    fn node_lists_and_ports_are_read() {
        let node = |list| first_node(list).expect("a node");
        assert_eq!([node("a,b"), node("gpu[03-05,9],x"), node("r[1-2]n3,q")], ["a", "gpu03", "r1n3"]);
        assert_eq!(with_port("fe80::1".into(), None), "[fe80::1]:7447");
        assert_eq!(with_port("[fe80::1]:9".into(), None), "[fe80::1]:9");
        assert_eq!(first_node("broken[1"), None);
    }
}

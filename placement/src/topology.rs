//! A cluster: its ranks, what each holds, and what a move between two of them costs.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::ids::{HostId, Rank};

/// What is wrong with a topology.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// The file could not be read.
    #[error("topology {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the TOML of a topology.
    #[error("topology {path}: {message}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// There is no rank, or more than 65536.
    #[error("a topology names 1 to 65536 ranks; this one names {0}")]
    Ranks(usize),
    /// The cost matrix is not R x R.
    #[error("cost has {rows} rows and row {row} has {columns} entries; expected {ranks} x {ranks}")]
    CostShape {
        /// Rows.
        rows: usize,
        /// The row that is wrong.
        row: usize,
        /// Its entries.
        columns: usize,
        /// R.
        ranks: usize,
    },
    /// A cost is negative or not a number, or a rank's cost to itself is not zero.
    #[error("cost from rank {from} to rank {to} is {value}; expected 0 or more, and 0 from a rank to itself")]
    Cost {
        /// From.
        from: Rank,
        /// To.
        to: Rank,
        /// What stands there.
        value: f64,
    },
    /// No link reaches a rank.
    #[error(
        "no link reaches rank {rank} ({from} -> {rank} has no finite cost): write its cost, or leave the rank out"
    )]
    Unreachable {
        /// The rank.
        rank: Rank,
        /// A rank from which it is not reached.
        from: Rank,
    },
    /// Neither a matrix nor the link class that two ranks need.
    #[error(
        "ranks {a} and {b} need [link.{class}] (latency_us, gbit_per_s), which is absent; write it, or `cost`"
    )]
    LinkMissing {
        /// One rank.
        a: Rank,
        /// The other.
        b: Rank,
        /// `local`, `host` or `network`.
        class: &'static str,
    },
    /// A link's figures make no sense.
    #[error("[link.{class}]: latency_us must be 0 or more and gbit_per_s above 0")]
    Link {
        /// `local`, `host` or `network`.
        class: &'static str,
    },
    /// A rank's figures make no sense.
    #[error("rank {rank}: {what} is {value}; it must be a number above 0")]
    RankFigure {
        /// The rank.
        rank: Rank,
        /// `speed` or `memory_gb`.
        what: &'static str,
        /// What stands there.
        value: f64,
    },
}

/// How fast one class of links is.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// One-way latency α, in microseconds.
    pub latency_us: f64,
    /// Bandwidth 1/β, in 10^9 bits per second.
    pub gbit_per_s: f64,
}

impl Link {
    /// α + β·bytes, in microseconds.
    pub fn time_us(&self, bytes: f64) -> f64 {
        self.latency_us + bytes * 8.0 / (self.gbit_per_s * 1e3)
    }
}

/// Link classes: `local` joins ranks of one group on one host, `host` other ranks of one host,
/// `network` ranks of different hosts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Ranks with the same host and the same `group`.
    pub local: Option<Link>,
    /// Ranks with the same host.
    pub host: Option<Link>,
    /// Ranks of different hosts.
    pub network: Option<Link>,
}

/// One rank as the file writes it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankSpec {
    /// Its machine.
    pub host: HostId,
    /// Experts of each layer that it holds; `None`: an even share, or what `memory_gb` gives.
    pub slots: Option<usize>,
    /// Memory for experts, attention weights and K/V, in 10^9 bytes.
    pub memory_gb: Option<f64>,
    /// Relative speed; enters the load term only.
    pub speed: f64,
}

/// A cluster of R ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Topology {
    /// The ranks, `[R]`.
    pub ranks: Vec<RankSpec>,
    /// Names of the hosts, by `HostId`.
    pub hosts: Vec<String>,
    /// `[R, R]` row-major: cost of a move from rank g to rank h; zero diagonal. 1 per move where
    /// nothing was written, microseconds per row where it comes from links.
    pub cost: Vec<f64>,
    /// The link classes, where the file has them.
    pub links: Option<Links>,
    /// `group` of each rank, for `link.local`.
    groups: Vec<Option<String>>,
}

#[derive(Deserialize)]
struct File {
    ranks: Vec<FileRank>,
    cost: Option<Vec<Vec<f64>>>,
    link: Option<Links>,
    /// Bytes of a row in `cost` made from links; 0: latency alone.
    #[serde(default)]
    row_bytes: f64,
}

#[derive(Deserialize)]
struct FileRank {
    host: Option<String>,
    group: Option<String>,
    slots: Option<usize>,
    memory_gb: Option<f64>,
    speed: Option<f64>,
}

impl Topology {
    /// `ranks` equal ranks on one host; every move costs 1; even slots.
    pub fn uniform(ranks: usize) -> Self {
        Self::hosts(1, ranks, 1.0, 1.0)
    }

    /// `hosts` hosts of `per_host` equal ranks; a move costs `inside` within a host and `across` between hosts.
    pub fn hosts(hosts: usize, per_host: usize, inside: f64, across: f64) -> Self {
        let (count, each) = (hosts * per_host, per_host.max(1));
        let spec = |rank: usize| RankSpec {
            host: HostId::from(rank / each),
            slots: None,
            memory_gb: None,
            speed: 1.0,
        };
        let price = |g: usize, h: usize| match (g == h, g / each == h / each) {
            (true, _) => 0.0,
            (false, true) => inside,
            (false, false) => across,
        };
        Self {
            ranks: (0..count).map(spec).collect(),
            hosts: (0..hosts).map(|host| host.to_string()).collect(),
            cost: (0..count * count).map(|i| price(i / count, i % count)).collect(),
            links: None,
            groups: vec![None; count],
        }
    }

    /// The same with one link between all ranks where none is known; costs stay as they are.
    pub fn or_linked(mut self, link: Link) -> Self {
        self.links.get_or_insert(Links { local: None, host: Some(link), network: Some(link) });
        self
    }

    /// Number of ranks R.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Whether there is no rank; `check` refuses such a topology.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// The host of a rank.
    pub fn host_of(&self, rank: Rank) -> HostId {
        self.ranks[rank.index()].host
    }

    /// The link between two ranks, where link classes are known: their class's name and figures.
    pub fn link_between(&self, a: Rank, b: Rank) -> Option<(&'static str, Link)> {
        let links = self.links.as_ref()?;
        let (name, link) = self.class_of(links, a.index(), b.index());
        link.map(|link| (name, link))
    }

    /// Reads the TOML form:
    /// `ranks = [{ host = "a", slots = 8, speed = 1.0 }, …]` (or `memory_gb`) and `cost = [[…]]` or
    /// `[link.local]`, `[link.host]`, `[link.network]`; with links, `row_bytes` is the size of a row.
    pub fn load(path: &Path) -> Result<Self, TopologyError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| TopologyError::Io { path: path.into(), source })?;
        let file: File = toml::from_str(&text)
            .map_err(|e| TopologyError::Toml { path: path.into(), message: e.to_string() })?;
        Self::from_file(file)
    }

    fn from_file(file: File) -> Result<Self, TopologyError> {
        let mut hosts: Vec<String> = Vec::new();
        let mut ranks = Vec::with_capacity(file.ranks.len());
        let mut groups = Vec::with_capacity(file.ranks.len());
        for rank in file.ranks {
            let name = rank.host.unwrap_or_default();
            let host = hosts.iter().position(|known| *known == name).unwrap_or_else(|| {
                hosts.push(name);
                hosts.len() - 1
            });
            let (slots, memory_gb, speed) = (rank.slots, rank.memory_gb, rank.speed.unwrap_or(1.0));
            ranks.push(RankSpec { host: HostId::from(host), slots, memory_gb, speed });
            groups.push(rank.group);
        }
        let mut topology = Self { ranks, hosts, cost: Vec::new(), links: file.link, groups };
        topology.cost = match (file.cost, file.link) {
            (Some(rows), _) => topology.flatten(&rows)?,
            (None, Some(links)) => topology.cost_from_links(&links, file.row_bytes)?,
            (None, None) => Self::uniform(topology.len()).cost,
        };
        topology.check()?;
        Ok(topology)
    }

    fn flatten(&self, rows: &[Vec<f64>]) -> Result<Vec<f64>, TopologyError> {
        let ranks = self.len();
        let wrong = rows.iter().position(|row| row.len() != ranks);
        if let Some(row) = wrong.or((rows.len() != ranks).then_some(0)) {
            let columns = rows.get(row).map_or(0, Vec::len);
            return Err(TopologyError::CostShape { rows: rows.len(), row, columns, ranks });
        }
        Ok(rows.concat())
    }

    fn cost_from_links(&self, links: &Links, row_bytes: f64) -> Result<Vec<f64>, TopologyError> {
        let ranks = self.len();
        let mut cost = vec![0.0; ranks * ranks];
        for at in (0..ranks * ranks).filter(|at| at / ranks != at % ranks) {
            let (g, h) = (at / ranks, at % ranks);
            let (class, link) = self.class_of(links, g, h);
            let (a, b) = (Rank::from(g), Rank::from(h));
            let link = link.ok_or(TopologyError::LinkMissing { a, b, class })?;
            if !(link.latency_us >= 0.0 && link.gbit_per_s > 0.0 && row_bytes >= 0.0) {
                return Err(TopologyError::Link { class });
            }
            cost[at] = link.time_us(row_bytes);
        }
        Ok(cost)
    }

    /// `local` falls back on `host` where the file has no such class.
    fn class_of(&self, links: &Links, g: usize, h: usize) -> (&'static str, Option<Link>) {
        let same_group = self.groups[g].is_some() && self.groups[g] == self.groups[h];
        match (self.ranks[g].host == self.ranks[h].host, same_group) {
            (false, _) => ("network", links.network),
            (true, true) if links.local.is_some() => ("local", links.local),
            (true, _) if links.host.is_some() => ("host", links.host),
            (true, _) if links.local.is_some() => ("local", links.local),
            (true, _) => ("host", None),
        }
    }

    /// Whether ranks, speeds, memory and costs make sense and every rank is reached.
    pub fn check(&self) -> Result<(), TopologyError> {
        let ranks = self.len();
        if ranks == 0 || ranks > 1 << 16 {
            return Err(TopologyError::Ranks(ranks));
        }
        if self.cost.len() != ranks * ranks {
            let rows = self.cost.len() / ranks;
            return Err(TopologyError::CostShape { rows, row: 0, columns: self.cost.len(), ranks });
        }
        for (index, spec) in self.ranks.iter().enumerate() {
            let figures = [("speed", Some(spec.speed)), ("memory_gb", spec.memory_gb)];
            let wrong = figures.into_iter().find(|(_, v)| v.is_some_and(|v| !(v > 0.0 && v.is_finite())));
            if let Some((what, value)) = wrong {
                let (rank, value) = (Rank::from(index), value.unwrap_or(f64::NAN));
                return Err(TopologyError::RankFigure { rank, what, value });
            }
        }
        self.check_cost()
    }

    fn check_cost(&self) -> Result<(), TopologyError> {
        let ranks = self.len();
        for (at, &value) in self.cost.iter().enumerate() {
            let (from, to) = (Rank::from(at / ranks), Rank::from(at % ranks));
            if value.is_nan() || value < 0.0 || (from == to && value != 0.0) {
                return Err(TopologyError::Cost { from, to, value });
            }
        }
        let Some(at) = self.cost.iter().position(|value| !value.is_finite()) else { return Ok(()) };
        let (from, to) = (at / ranks, at % ranks);
        let reached = |rank: usize| (0..ranks).any(|g| g != rank && self.cost[g * ranks + rank].is_finite());
        let (rank, from) = if reached(to) && !reached(from) { (from, to) } else { (to, from) };
        Err(TopologyError::Unreachable { rank: Rank::from(rank), from: Rank::from(from) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Topology, TopologyError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        std::fs::write(&path, text).unwrap();
        Topology::load(&path)
    }

    #[test]
    fn links_give_microseconds_per_row() {
        let text = r#"
            row_bytes = 1000
            ranks = [{ host = "a", slots = 2 }, { host = "a", slots = 2, speed = 2.0 }, { host = "b", memory_gb = 8 }]
            [link.host]
            latency_us = 2
            gbit_per_s = 8
            [link.network]
            latency_us = 50
            gbit_per_s = 1
        "#;
        let topology = load(text).unwrap();
        assert_eq!(topology.cost, [0., 3., 58., 3., 0., 58., 58., 58., 0.]);
        assert_eq!(topology.host_of(Rank(2)), HostId(1));
    }

    #[test]
    fn wrong_files_are_named_errors() {
        let two = "ranks = [{ host = \"a\" }, { host = \"b\" }]\n";
        let cost = |rows: &str| load(&format!("{two}cost = {rows}"));
        assert!(matches!(cost("[[0, 1]]"), Err(TopologyError::CostShape { .. })));
        assert!(matches!(cost("[[0, 1], [1]]"), Err(TopologyError::CostShape { row: 1, .. })));
        assert!(matches!(cost("[[0, -1], [1, 0]]"), Err(TopologyError::Cost { .. })));
        assert!(matches!(cost("[[1, 1], [1, 0]]"), Err(TopologyError::Cost { .. })));
        assert!(matches!(cost("[[0, nan], [1, 0]]"), Err(TopologyError::Cost { .. })));
        assert!(matches!(cost("[[0, inf], [1, 0]]"), Err(TopologyError::Unreachable { rank: Rank(1), .. })));
        let linked = format!("{two}[link.host]\nlatency_us = 1\ngbit_per_s = 1");
        assert!(matches!(load(&linked), Err(TopologyError::LinkMissing { class: "network", .. })));
        assert!(matches!(load("ranks = []"), Err(TopologyError::Ranks(0))));
        assert!(matches!(load("ranks = [{ speed = 0 }]"), Err(TopologyError::RankFigure { .. })));
        assert!(matches!(load("nonsense"), Err(TopologyError::Toml { .. })));
    }
}

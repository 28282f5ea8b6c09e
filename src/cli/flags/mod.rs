//! Flags that several verbs share.

pub(crate) mod group;

use super::failure::Failure;
use super::output;
use super::plan::Chosen;
use clap::ValueEnum;
use exflow::engine::{
    Cluster, ClusterOptions, Combine, Domain, Dtype, KvDtype, KvWire, Linger, Numerics, Overlap,
    PlacementSource, Prefill, Progress, Quant, Schedule, Strategy, TransportKind,
};
use exflow::transport::link::LinkSpec;
use std::path::{Path, PathBuf};

/// Which model, on how many ranks, joined and placed how.
#[derive(Debug, clap::Args)]
pub(crate) struct RankFlags {
    /// Model folder: config.json, *.safetensors, tokenizer.json; or a name on the Hub, ORG/NAME or ORG/NAME@REVISION
    #[arg(short, long, value_name = "DIR|ORG/NAME")]
    pub(crate) model: PathBuf,
    /// Ranks of this process, where it is the only one
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = ranks, conflicts_with_all = ["rank", "world_size", "leader"])]
    pub(crate) ep_size: usize,
    /// What joins the ranks of this process
    #[arg(long, value_enum, default_value = "local")]
    pub(crate) transport: Transport,
    /// vanilla: two exchanges per MoE layer; coherent: one (top-1); auto: measures first, then picks the strategy and, where
    /// none is given, the schedule (`exflow plan` shows the choice; verbs that make no text take coherent)
    #[arg(long, value_enum, default_value = "coherent")]
    pub(crate) strategy: StrategyFlag,
    /// exact: bit-identical to one rank; sum: fewer bytes, other rounding
    #[arg(long, value_enum, default_value = "exact")]
    pub(crate) combine: CombineFlag,
    /// rounds: every exchange waits for all ranks; flow: a rank works on whatever is ready [default: rounds, or what
    /// --strategy auto picks]
    #[arg(long, value_enum)]
    pub(crate) schedule: Option<ScheduleFlag>,
    /// What runs while rows are on their way, in rounds. off: nothing; own: rows that stay; peers: also each peer's rows as
    /// soon as they come; halves: decode steps in two halves, one of which computes while the other's rows travel; auto:
    /// own, and peers and halves where they are measured to pay
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) overlap: OverlapFlag,
    /// How long ready rows are held back so that others may share their launch, in flow: off, auto (as long as is measured to
    /// pay), or a time up to 100ms
    #[arg(long, value_name = "off|auto|TIME", default_value = "auto", value_parser = linger)]
    pub(crate) linger: Linger,
    /// Where prompts are prefilled. home: on one rank, which sends the keys and values to where tokens may go; replicated:
    /// on every rank, which sends none (with --combine exact)
    #[arg(long, value_enum, default_value = "home")]
    pub(crate) prefill: PrefillFlag,
    /// How far from its home a sequence's tokens may live under coherent: host (its process; behind --link each rank is a
    /// host), pair (ranks 0 and 1, 2 and 3, …), world. Less far is fewer keys and values sent, and more rows that come back
    #[arg(long, value_enum, default_value = "world")]
    pub(crate) domain: DomainFlag,
    /// Shapes what each rank sends (with --transport quic): lan, wifi, wan, or latency=5ms,rate=100mbit,…
    #[arg(long, value_name = "LINK", value_parser = link)]
    pub(crate) link: Option<LinkSpec>,
    /// Where experts live: a table file, round_robin or linear
    #[arg(long, value_name = "FILE|round_robin|linear", default_value = "round_robin", value_parser = placement)]
    pub(crate) placement: PlacementSource,
    /// Adapter: part of its name, or its number in `exflow devices` [default: the best one]
    #[arg(long, value_name = "NAME|N")]
    pub(crate) adapter: Option<String>,
    /// How matrices lie on the device: f32, or f16 in half the memory
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: DtypeFlag,
    /// Matrices rounded on load to blocks of 32 weights that share a scale, in place of --dtype
    #[arg(long, value_enum)]
    pub(crate) quant: Option<QuantFlag>,
    /// exact: products of f32 in one order; fast: with --quant (or MXFP4 experts) rows are rounded to bytes too, which are
    /// multiplied as such; without, or where `exflow devices --tune` measured that it gains, rows and matrices are to f16, for matrix
    /// units where the adapter has them. Both give a row
    /// the same bits in any batch, on any number of ranks with equal adapters
    #[arg(long, value_name = "exact|fast", default_value_t = Numerics::Exact)]
    pub(crate) numerics: Numerics,
    /// How the cache, and frames that carry keys and values, hold them
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) kv_dtype: KvFlag,
    /// How keys and values travel. cache: as it holds them; hidden: as their layer's input, from which every rank makes them
    /// anew: half the bytes of an f32 cache where every head has its own (refused where it would be more), equal adapters only
    #[arg(long, value_enum, default_value = "cache")]
    pub(crate) kv_wire: KvWireFlag,
    /// Positions of KV cache on every rank, for all sequences together [default: what the memory that is left holds]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ctx_size: Option<u32>,
    #[command(flatten)]
    pub(crate) group: group::GroupFlags,
}

impl RankFlags {
    /// As the engine wants them.
    pub(crate) fn options(&self) -> Result<ClusterOptions, Failure> {
        let mut options = ClusterOptions::new(&self.model);
        options.ranks = self.ep_size;
        options.transport = self.transport.into();
        options.strategy = self.strategy.into();
        options.combine = self.combine.into();
        options.schedule = self.schedule.map_or(Schedule::Rounds, Into::into);
        if self.is_auto() {
            // Ranks measure in rounds.
            options.schedule = Schedule::Rounds;
        }
        (options.prefill, options.domain) = (self.prefill.into(), self.domain.into());
        options.overlap = self.overlap.into();
        options.linger = self.linger;
        options.link = self.link;
        options.placement = self.placement.clone();
        options.adapter = self.adapter.clone();
        options.dtype = self.dtype.into();
        options.quant = self.quant.map(Into::into);
        options.numerics = self.numerics;
        options.kv_dtype = self.kv_dtype.into();
        options.kv_wire = self.kv_wire.into();
        options.cache_positions = self.ctx_size.map(|n| n as usize);
        self.group.apply(&mut options)?;
        Ok(options)
    }

    /// Whether a planner is to pick.
    pub(crate) fn is_auto(&self) -> bool {
        self.strategy == StrategyFlag::Auto
    }

    /// What to run, where this process leads; one that does not lead serves rank 0 to its end and gives none.
    pub(crate) fn led(&self, progress: &dyn Progress) -> Result<Option<ClusterOptions>, Failure> {
        group::led(self.options()?, progress)
    }

    /// The cluster, where this process leads.
    pub(crate) fn start(&self, progress: &dyn Progress) -> Result<Option<Cluster>, Failure> {
        let Some(options) = self.led(progress)? else { return Ok(None) };
        Ok(Some(Cluster::start(options, progress)?))
    }

    /// With `--strategy auto`, has the cluster run as is best for so many sequences.
    pub(crate) fn tune(&self, cluster: &mut Cluster, sequences: usize) -> Result<Option<Chosen>, Failure> {
        match self.is_auto() {
            true => super::plan::tune(cluster, sequences, self.schedule.map(Into::into)),
            false => Ok(None),
        }
    }

    /// Ranks for which the driver is to be set up: 0 for one rank with matrices so large that a pool of threads pays
    /// on adapters that are CPUs (`exflow::engine::prepare_process`).
    pub(crate) fn hosted(&self) -> usize {
        hosted(&self.model, self.ep_size)
    }

    /// Says which placement is in use where it decides anything.
    pub(crate) fn note_placement(&self) {
        if self.ep_size < 2 {
            return;
        }
        output::note(&match &self.placement {
            PlacementSource::RoundRobin => {
                "placement: round_robin (the default; --placement FILE takes a table of `exflow place`)"
                    .into()
            }
            PlacementSource::Linear => "placement: linear".to_owned(),
            PlacementSource::File(path) => format!("placement: {}", path.display()),
            PlacementSource::Table(_) => "placement: given".to_owned(),
        });
    }
}

/// Where the time of matrix products outweighs the 45 µs that each launch pays for the pool, unless it was measured here.
const LARGE_MODEL_BYTES: u64 = 128 << 20;

/// Bytes of a model's files from which on the driver's pool of threads pays for one rank.
pub(super) fn large_model_bytes() -> u64 {
    exflow::engine::pool_from_bytes().unwrap_or(LARGE_MODEL_BYTES)
}

/// `ranks`, or 0 for one with large matrices. What is still to be downloaded from a Hub is large.
pub(crate) fn hosted(model: &Path, ranks: usize) -> usize {
    let is_large =
        || exflow::hub::local(model).is_none_or(|folder| weight_bytes(&folder) >= large_model_bytes());
    if ranks == 1 && is_large() { 0 } else { ranks }
}

/// Bytes of a model folder's weights; 0 where it cannot be read, which others will tell.
fn weight_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let weights = files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
    weights.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|data| data.len()).sum()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    Local,
    Quic,
}

impl From<Transport> for TransportKind {
    fn from(flag: Transport) -> Self {
        match flag {
            Transport::Local => Self::Local,
            Transport::Quic => Self::Quic,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StrategyFlag {
    Vanilla,
    Coherent,
    Auto,
}

impl From<StrategyFlag> for Strategy {
    fn from(flag: StrategyFlag) -> Self {
        match flag {
            StrategyFlag::Vanilla => Self::Vanilla,
            StrategyFlag::Coherent | StrategyFlag::Auto => Self::Coherent,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeFlag {
    F32,
    F16,
}

impl From<DtypeFlag> for Dtype {
    fn from(flag: DtypeFlag) -> Self {
        match flag {
            DtypeFlag::F32 => Self::F32,
            DtypeFlag::F16 => Self::F16,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScheduleFlag {
    Rounds,
    Flow,
}

impl From<ScheduleFlag> for Schedule {
    fn from(flag: ScheduleFlag) -> Self {
        match flag {
            ScheduleFlag::Rounds => Self::Rounds,
            ScheduleFlag::Flow => Self::Flow,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverlapFlag {
    Off,
    Own,
    Peers,
    Halves,
    Auto,
}

impl From<OverlapFlag> for Overlap {
    fn from(flag: OverlapFlag) -> Self {
        match flag {
            OverlapFlag::Off => Self::Off,
            OverlapFlag::Own => Self::Own,
            OverlapFlag::Peers => Self::Peers,
            OverlapFlag::Halves => Self::Halves,
            OverlapFlag::Auto => Self::Auto,
        }
    }
}

/// How long rows are held back: `off`, `auto` or a time.
pub(crate) fn linger(text: &str) -> Result<Linger, String> {
    match text {
        "off" => Ok(Linger::Off),
        "auto" => Ok(Linger::Auto),
        time => match duration(time) {
            Ok(time) if time <= Linger::MOST => Ok(Linger::For(time)),
            Ok(_) => Err(format!("at most {} ms", Linger::MOST.as_millis())),
            Err(error) => Err(format!("use off, auto or a time: {error}")),
        },
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefillFlag {
    Home,
    Replicated,
}

impl From<PrefillFlag> for Prefill {
    fn from(flag: PrefillFlag) -> Self {
        match flag {
            PrefillFlag::Home => Self::Home,
            PrefillFlag::Replicated => Self::Replicated,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DomainFlag {
    Host,
    Pair,
    World,
}

impl From<DomainFlag> for Domain {
    fn from(flag: DomainFlag) -> Self {
        match flag {
            DomainFlag::Host => Self::Host,
            DomainFlag::Pair => Self::Pair,
            DomainFlag::World => Self::World,
        }
    }
}

/// A link to order.
pub(crate) fn link(text: &str) -> Result<LinkSpec, String> {
    text.parse().map_err(|error: exflow::transport::TransportError| error.to_string())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantFlag {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

impl From<QuantFlag> for Quant {
    fn from(flag: QuantFlag) -> Self {
        match flag {
            QuantFlag::Q8_0 => Self::Q8_0,
            QuantFlag::Q4_0 => Self::Q4_0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvFlag {
    F32,
    F16,
    Q8,
}

impl From<KvFlag> for KvDtype {
    fn from(flag: KvFlag) -> Self {
        match flag {
            KvFlag::F32 => Self::F32,
            KvFlag::F16 => Self::F16,
            KvFlag::Q8 => Self::Q8,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvWireFlag {
    Cache,
    Hidden,
}

impl From<KvWireFlag> for KvWire {
    fn from(flag: KvWireFlag) -> Self {
        match flag {
            KvWireFlag::Cache => Self::Cache,
            KvWireFlag::Hidden => Self::Hidden,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CombineFlag {
    Exact,
    Sum,
}

impl From<CombineFlag> for Combine {
    fn from(flag: CombineFlag) -> Self {
        match flag {
            CombineFlag::Exact => Self::Exact,
            CombineFlag::Sum => Self::Sum,
        }
    }
}

/// A number of ranks, 1 or more.
pub(crate) fn ranks(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(ranks @ 1..=65_535) => Ok(ranks),
        _ => Err("the number of ranks must be a whole number from 1 to 65535".into()),
    }
}

/// Where experts live, as typed.
pub(crate) fn placement(text: &str) -> Result<PlacementSource, String> {
    Ok(match text {
        "round_robin" => PlacementSource::RoundRobin,
        "linear" => PlacementSource::Linear,
        path => PlacementSource::File(PathBuf::from(path)),
    })
}

/// Ids as typed, `1,2,3`, spaces allowed.
pub(crate) fn token_ids(text: &str) -> Result<Vec<u32>, Failure> {
    text.split(',').map(|id| token_id(id.trim())).collect()
}

fn token_id(text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|_| {
        Failure::Input(format!("--prompt-ids: {text:?} is not a token id; give whole numbers as in 1,2,3"))
    })
}

/// A text file, whole; bytes that are not UTF-8 are replaced.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Err(Failure::Input(format!(
            "text file {}: {error}; give a file that can be read",
            path.display()
        ))),
    }
}

/// Whether a file can be written there, before minutes are spent on what it should hold.
pub(crate) fn check_out(path: &Path) -> Result<(), Failure> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let reason = match folder {
        Some(folder) if !folder.is_dir() => "its folder does not exist; create it",
        _ if path.is_dir() => "it is a folder; give a file",
        _ => return Ok(()),
    };
    Err(Failure::Input(format!("{}: cannot be written: {reason}", path.display())))
}

/// A duration as people write it: `10s`, `1.5m`, `500ms`, or seconds.
pub(crate) fn duration(text: &str) -> Result<std::time::Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let factor = match &text[split..] {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        unit => return Err(format!("unknown unit {unit:?}; use us, ms, s, m or h")),
    };
    let seconds =
        text[..split].trim().parse::<f64>().map_err(|_| "give a time as in 10s".to_owned())? * factor;
    std::time::Duration::try_from_secs_f64(seconds).map_err(|_| "give a time from 0 up, as in 10s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ids_as_typed() {
        assert_eq!(token_ids("1, 2,3").ok(), Some(vec![1, 2, 3]));
        for wrong in ["", "1,,2", "1,x", "-1", "4294967296"] {
            assert!(matches!(token_ids(wrong), Err(Failure::Input(_))), "{wrong}");
        }
    }

    #[test]
    fn times_as_typed() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        for wrong in ["", "s", "-1s", "10 fortnights", "nan", "1e400"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lingering_as_typed() {
        assert_eq!((linger("off"), linger("auto")), (Ok(Linger::Off), Ok(Linger::Auto)));
        assert_eq!(linger("500us"), Ok(Linger::For(Duration::from_micros(500))));
        for wrong in ["", "on", "1s", "101ms", "-1ms"] {
            assert!(linger(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn worlds_as_typed() {
        assert_eq!(ranks("4"), Ok(4));
        for wrong in ["0", "-1", "65536", "four"] {
            assert!(ranks(wrong).is_err(), "{wrong}");
        }
    }
}

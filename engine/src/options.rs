//! What a caller chooses.

use crate::EngineError;
use exflow_placement::{Affinity, PlacementTable, Strategy};
use exflow_shaders::Cache;
use exflow_transport::link::LinkSpec;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Where each expert goes.
#[allow(clippy::large_enum_variant, reason = "there is one per cluster")]
#[derive(Debug, Clone)]
pub enum PlacementSource {
    /// Expert e of every layer on rank e mod R.
    RoundRobin,
    /// Contiguous blocks of experts.
    Linear,
    /// A placement table on disk.
    File(PathBuf),
    /// A placement table at hand.
    Table(PlacementTable),
}

impl FromStr for PlacementSource {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "round_robin" => Self::RoundRobin,
            "linear" => Self::Linear,
            path => Self::File(path.into()),
        })
    }
}

impl fmt::Display for PlacementSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RoundRobin => f.write_str("round_robin"),
            Self::Linear => f.write_str("linear"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Table(_) => f.write_str("table"),
        }
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $word:literal),* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),* })
            }
        }

        impl FromStr for $name {
            type Err = EngineError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    other => Err(EngineError::usage(
                        format!("{other:?} is no {}", $what),
                        format!("use one of: {}", [$($word),*].join(", ")),
                    )),
                }
            }
        }
    };
}

words! {
    /// How the ranks of one process exchange rows.
    TransportKind, "transport" {
        /// Through memory.
        Local = "local",
        /// Through QUIC connections on the loopback interface.
        Quic = "quic"
    }
}
words! {
    /// How the outputs of a token's experts come together.
    Combine, "way to combine" {
        /// One partial per expert, added in router order as one rank does it: the same bits in any world.
        Exact = "exact",
        /// Each rank adds its experts' partials first: fewer bytes, other rounding.
        Sum = "sum"
    }
}
words! {
    /// What a rank waits for.
    Schedule, "schedule" {
        /// Each exchange is one that all ranks take part in: the paper's form.
        Rounds = "rounds",
        /// No exchange is a barrier: a rank works on whatever tokens are ready.
        Flow = "flow"
    }
}
words! {
    /// What runs while rows are on their way, in rounds. It moves work in time and never changes a bit.
    Overlap, "overlap" {
        /// Nothing: experts start when all rows have come. Of use only to find out what the rest is worth.
        Off = "off",
        /// The rows that stay start before others come.
        Own = "own",
        /// Those, and each peer's rows as soon as they come.
        Peers = "peers",
        /// Rows that stay; and every decode step runs in two halves, one of which computes while the other's rows travel.
        Halves = "halves",
        /// Rows that stay always; the rest where it was measured to pay while running.
        Auto = "auto"
    }
}
words! {
    /// Where prompts are prefilled.
    Prefill, "way to prefill" {
        /// Each on its home, which sends the keys and values to where its tokens may go.
        Home = "home",
        /// Each on every rank, as in the paper: no keys and values are sent, and every rank's attention does all of it.
        Replicated = "replicated"
    }
}
words! {
    /// How far from its home a sequence's tokens may live.
    Domain, "domain" {
        /// On the ranks of its home's process; behind a shaped link each rank counts as a host of its own.
        Host = "host",
        /// On its home and the rank beside it: 0 and 1, 2 and 3, …
        Pair = "pair",
        /// Anywhere.
        World = "world"
    }
}
words! {
    /// How [`Cluster::logits`](crate::Cluster::logits) feeds the ids.
    Feed, "feed" {
        /// All at once.
        Prefill = "prefill",
        /// The first as a prompt, each further one as a decode step.
        Decode = "decode"
    }
}

words! {
    /// How matrices lie on the device; norms, biases, routers and embeddings are f32 always, and so is arithmetic.
    Dtype, "type of weights" {
        /// 4 bytes a weight.
        F32 = "f32",
        /// 2 bytes a weight: the same numbers where the model is published in f16, rounded to them elsewhere.
        F16 = "f16"
    }
}

words! {
    /// Matrices quantised while they are loaded: blocks of 32 weights along a row share an f16 scale.
    Quant, "quantisation" {
        /// A byte a weight.
        Q8_0 = "q8_0",
        /// Half a byte a weight.
        Q4_0 = "q4_0"
    }
}

words! {
    /// In which order, and on which numbers, matrix products are formed. Either way a row has the same bits in any batch.
    Numerics, "kind of numerics" {
        /// f32 throughout, in one stated order.
        Exact = "exact",
        /// Where matrices share scales (`--quant`, MXFP4) rows are rounded to bytes, 32 columns to a scale, and bytes are
        /// multiplied as such, unless matrix units were measured to gain on that; other matrices and their rows are rounded to
        /// f16 where the adapter has matrix units to multiply them.
        Fast = "fast"
    }
}

words! {
    /// How the cache holds keys and values; whoever makes them rounds them first, so that every rank holds the same.
    KvDtype, "type of the cache" {
        /// 4 bytes a value.
        F32 = "f32",
        /// 2 bytes.
        F16 = "f16",
        /// A byte, and a scale for 32 values.
        Q8 = "q8"
    }
}

words! {
    /// How keys and values travel to the other ranks of a layer's domain.
    KvWire, "form of keys and values on the wire" {
        /// As the cache holds them.
        Cache = "cache",
        /// As the residual stream that entered the layer, in f32: the receiver norms, projects and turns it again, bit for
        /// bit. Of equal adapters only, and where that is fewer bytes: half of them for multi-head attention with a cache
        /// in f32.
        Hidden = "hidden"
    }
}

impl From<KvDtype> for Cache {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::F16 => Self::F16,
            KvDtype::Q8 => Self::Q8,
        }
    }
}

/// How long a rank in flow holds back rows that are ready, so that others may share their launch. It moves work in time
/// and never changes a bit; each process decides for its own ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linger {
    /// Not at all.
    Off,
    /// As long as was measured to pay while running, which may be not at all; at most 20 ms.
    Auto,
    /// Each row so long at every layer, where others may come and nothing else is to be done; at most [`Linger::MOST`].
    For(Duration),
}

impl Linger {
    /// The longest that can be asked for.
    pub const MOST: Duration = Duration::from_millis(100);
}

impl fmt::Display for Linger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::For(time) => write!(f, "{}us", time.as_micros()),
        }
    }
}

/// What to run and how.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Folder with config.json, model.safetensors and tokenizer.json.
    pub model: PathBuf,
    /// How many ranks this process hosts.
    pub ranks: usize,
    /// How they exchange rows.
    pub transport: TransportKind,
    /// Where a token goes after its experts ran.
    pub strategy: Strategy,
    /// How the outputs of a token's experts come together.
    pub combine: Combine,
    /// What a rank waits for.
    pub schedule: Schedule,
    /// Where prompts are prefilled.
    pub prefill: Prefill,
    /// How far from its home a sequence's tokens may live, under `coherent`.
    pub domain: Domain,
    /// What runs while rows are on their way, in rounds.
    pub overlap: Overlap,
    /// How long rows are held back for a fuller launch, in flow.
    pub linger: Linger,
    /// Shapes what each rank sends (QUIC only); `None`: as fast as it goes.
    pub link: Option<LinkSpec>,
    /// Where each expert goes.
    pub placement: PlacementSource,
    /// How often experts follow one another, as profiled: where the ranks that are left put a lost rank's experts.
    /// `None`: by load alone, or by what an [`Engine`](crate::Engine) has counted.
    pub affinity: Option<Arc<Affinity>>,
    /// Part of an adapter's name, or its index in [`devices`](crate::devices); `None`: the best one.
    pub adapter: Option<String>,
    /// How matrices lie on the device.
    pub dtype: Dtype,
    /// What matrices are rounded to in its place.
    pub quant: Option<Quant>,
    /// How matrix products are formed.
    pub numerics: Numerics,
    /// How the cache holds keys and values.
    pub kv_dtype: KvDtype,
    /// How keys and values travel.
    pub kv_wire: KvWire,
    /// Positions that the KV cache of every rank holds, for all sequences together; `None`: what is left of
    /// [`ClusterOptions::memory`] or, without it, of what the adapter has free, up to the contexts of all sequences that
    /// run at once; where the adapter is a CPU, a quarter of the host's free memory, up to 16 contexts or 16,384 positions.
    pub cache_positions: Option<usize>,
    /// Adapter of each rank of this process, like [`ClusterOptions::adapter`], which stands for all where this is
    /// empty.
    pub devices: Vec<String>,
    /// Bytes that each rank of this process may take: weights that do not fit are refused, the cache takes what is
    /// left. `None`: nothing is refused before it is tried.
    pub memory: Option<u64>,
    /// Whether memory is left for experts that move ([`Engine::move_to`](crate::Engine::move_to)) when the cache is sized by
    /// what is left: for those of another table beside those that a rank holds. The cache has its least size in any case.
    pub room_for_moves: bool,
    /// Whether devices draw tokens or the host does, which gives the same ones; `None`: devices that are no CPUs.
    pub draws_on_device: Option<bool>,
    /// Whether matrix units make products of matrices with scales too where numerics are fast, in place of bytes; `None`: those
    /// that `exflow devices --tune` measured to gain by it. On all ranks of a world, or on none.
    pub scales_on_units: Option<bool>,
    /// Bytes of experts' matrices, of the embedding's and the head's rows, or of logits, that are bound together at most; an expert, 32
    /// rows of a matrix and the logits of 64 tokens are never cut. `None`: as much as the adapter binds.
    pub chunk_bytes: Option<u64>,
    /// Decode steps that a single rank submits to its device as one; `None`: as many as take 3 ms together, four at most. Tokens come
    /// so many at a time, and are the same ones.
    pub steps_together: Option<usize>,
    /// Whether every kernel that steps of any number of rows launch is made before the first one, or each when it is first launched,
    /// for which that step waits; `None`: before the first where steps will be many, of several ranks or of an
    /// [`Engine`](crate::Engine).
    pub warm_up: Option<bool>,
    /// The group of processes that this one belongs to; `None`: all ranks are in this process.
    pub group: Option<GroupOptions>,
}

/// How several processes, here or on other hosts, make one world.
#[derive(Debug, Clone)]
pub struct GroupOptions {
    /// The number of this process; 0 leads.
    pub process: usize,
    /// How many processes there are; each hosts one rank or several.
    pub processes: usize,
    /// `HOST:PORT` where process 0 is reached.
    pub leader: String,
    /// UDP address to listen on; `None`: every interface, with process 0 on its leader's port.
    pub listen: Option<SocketAddr>,
    /// Folder of this process's identity, or one that holds it as `rank-N`.
    pub identity: PathBuf,
    /// How long the others are waited for.
    pub join_timeout: Duration,
    /// Told what happens to the group.
    pub observer: Observer,
}

impl GroupOptions {
    /// A minute's patience, any address, no shaping, nobody told.
    pub fn new(
        process: usize,
        processes: usize,
        leader: impl Into<String>,
        identity: impl Into<PathBuf>,
    ) -> Self {
        Self {
            process,
            processes,
            leader: leader.into(),
            listen: None,
            identity: identity.into(),
            join_timeout: Duration::from_secs(60),
            observer: Observer::default(),
        }
    }
}

/// Told in words what happens to a group: who joined, who was refused, which epoch begins. May be called on any
/// thread and must not block.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Tell>>);

type Tell = dyn Fn(&str) + Send + Sync;

impl Observer {
    /// Calls `tell` with each line.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    pub(crate) fn tell(&self, what: &str) {
        tracing::info!("{what}");
        if let Some(tell) = &self.0 {
            tell(what);
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

impl ClusterOptions {
    /// One rank, in process, `coherent`, `exact`, `round_robin`, the best adapter.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            ranks: 1,
            transport: TransportKind::Local,
            strategy: Strategy::Coherent,
            combine: Combine::Exact,
            schedule: Schedule::Rounds,
            prefill: Prefill::Home,
            domain: Domain::World,
            overlap: Overlap::Auto,
            linger: Linger::Auto,
            link: None,
            placement: PlacementSource::RoundRobin,
            affinity: None,
            adapter: None,
            dtype: Dtype::F32,
            quant: None,
            numerics: Numerics::Exact,
            kv_dtype: KvDtype::F32,
            kv_wire: KvWire::Cache,
            cache_positions: None,
            devices: Vec::new(),
            memory: None,
            room_for_moves: false,
            chunk_bytes: None,
            draws_on_device: None,
            scales_on_units: None,
            steps_together: None,
            warm_up: None,
            group: None,
        }
    }

    /// The adapter that rank `local` of this process is to run on.
    pub(crate) fn adapter_of(&self, local: usize) -> Option<&str> {
        let own = (!self.devices.is_empty()).then(|| &self.devices[local % self.devices.len()]);
        own.or(self.adapter.as_ref()).map(String::as_str)
    }
}

/// Told how far something that takes time has come.
pub trait Progress: Send + Sync {
    /// `stage` ("load rank 2", "profile") has done `done` of `total` `unit`s ("elements", "tokens").
    fn update(&self, stage: &str, done: u64, total: u64, unit: &str);

    /// What `stage` has come to so far ("cost 812, bound 790"), to stand beside its next update.
    fn detail(&self, _stage: &str, _text: &str) {}
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn update(&self, _stage: &str, _done: u64, _total: u64, _unit: &str) {}
}

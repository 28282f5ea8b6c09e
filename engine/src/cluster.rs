//! Several ranks of this process running one model: the engine's public entry.

use crate::generate::{self, Run};
use crate::gpu::Gpu;
use crate::logits::{self, LogitsDump};
use crate::model::ModelSpec;
use crate::model::decoder::Decoder;
use crate::options::{ClusterOptions, Feed, PlacementSource, Progress, TransportKind};
use crate::runtime::{Admission, Command, Event, RankStats, Worker, WorkerOptions};
use crate::text::TextCodec;
use crate::weights::{self, ModelWeights, Store};
use crate::{EngineError, Generation, Request, TokenEvent};
use exflow_placement::{LayerId, PlacementTable, Rank, RoutingTrace};
use exflow_transport::Communicator;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Several ranks of this process running one model.
///
/// Each rank is a thread with its own device, its own experts and its own end of the transport. Dropping the
/// cluster ends them.
pub struct Cluster {
    options: ClusterOptions,
    spec: ModelSpec,
    table: PlacementTable,
    text: Result<Arc<TextCodec>, String>,
    adapters: Vec<String>,
    commands: Sender<Command>,
    events: Receiver<Event>,
    events_in: Sender<Event>,
    threads: Vec<JoinHandle<()>>,
    next_request: u32,
}

/// What all ranks of a start share.
struct Shared<'a> {
    store: Store,
    spec: ModelSpec,
    table: PlacementTable,
    options: ClusterOptions,
    progress: &'a dyn Progress,
}

/// Contexts of this many full lengths fit into the cache, unless that would take more than
/// [`CACHE_POSITIONS`] positions.
const CACHE_CONTEXTS: usize = 16;
const CACHE_POSITIONS: usize = 16_384;

impl Cluster {
    /// Loads the model onto the ranks and joins them.
    ///
    /// # Errors
    /// Bad options, a model that cannot be read, a table that does not fit: errors for which
    /// [`EngineError::is_input`] holds. No adapter, no memory, no connection: others.
    pub fn start(options: ClusterOptions, progress: &dyn Progress) -> Result<Self, EngineError> {
        let mut spec = ModelSpec::read(&options.model)?;
        check_ranks(&options, &spec)?;
        let store = Store::open(&options.model)?;
        weights::check(&spec, &store)?;
        spec.digest = store.digest(&options.model);
        let table = resolve_placement(&options, &spec)?;
        let text = TextCodec::open(&options.model, spec.vocab_size).map(Arc::new).map_err(|e| e.to_string());
        let comms = join(&options)?;
        let (events_in, events) = channel();
        let (commands, commands_out) = channel();
        let shared = Shared { store, spec: spec.clone(), table: table.clone(), options, progress };
        let decoders = shared.load_all()?;
        let mut commands_out = Some(commands_out);
        let mut threads = Vec::new();
        for (decoder, comm) in decoders.into_iter().zip(comms) {
            threads.push(shared.spawn(decoder, comm, events_in.clone(), commands_out.take())?);
        }
        let options = shared.options;
        let mut cluster = Self {
            options,
            spec,
            table,
            text,
            adapters: Vec::new(),
            commands,
            events,
            events_in,
            threads,
            next_request: 0,
        };
        cluster.await_ready()?;
        Ok(cluster)
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// Where tokenizer.json is missing or malformed; ids can be given all the same.
    pub fn text(&self) -> Result<&TextCodec, EngineError> {
        match &self.text {
            Ok(codec) => Ok(codec),
            // Read anew for the error itself, which cannot be kept and lent at once.
            Err(said) => Err(TextCodec::open(&self.options.model, self.spec.vocab_size)
                .err()
                .unwrap_or_else(|| EngineError::usage(said.clone(), "start again"))),
        }
    }

    /// The same, to be shared with other threads; `None` where ids are all there is.
    pub(crate) fn codec(&self) -> Option<Arc<TextCodec>> {
        self.text.as_ref().ok().cloned()
    }

    /// Positions of KV cache on each rank.
    pub(crate) fn cache_positions(&self) -> usize {
        cache_blocks(&self.options, &self.spec) * crate::runtime::BLOCK
    }

    /// Where each expert is.
    pub fn placement(&self) -> &PlacementTable {
        &self.table
    }

    /// What the cluster was started with.
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// Each rank's adapter.
    pub fn adapters(&self) -> Vec<String> {
        self.adapters.clone()
    }

    /// Runs the requests together to their end, calling `sink` as tokens appear.
    pub fn generate(
        &mut self,
        requests: &[Request],
        sink: &mut dyn FnMut(&TokenEvent),
    ) -> Result<Generation, EngineError> {
        generate::run(self, requests, sink)
    }

    /// Logits of every position of `ids`, with the experts chosen on the way.
    pub fn logits(&mut self, ids: &[u32], feed: Feed) -> Result<LogitsDump, EngineError> {
        logits::run(self, ids, feed)
    }

    /// The routes of every token of every sequence, in order, for affinity. Longer sequences than the model's
    /// context are cut into contexts.
    pub fn profile(
        &mut self,
        sequences: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<RoutingTrace, EngineError> {
        logits::profile(self, sequences, progress)
    }

    /// Sends `ids` to the model as a prompt.
    pub(crate) fn submit(&mut self, run: Run) -> Result<u32, EngineError> {
        generate::check_prompt(&self.spec, &run.prompt)?;
        generate::check_room(&self.spec, self.cache_positions(), run.prompt.len(), run.max_tokens)?;
        let request = self.next_request;
        self.next_request += 1;
        let admission = Admission {
            request,
            known: (run.prompt.len() + run.forced.len()) as u32,
            prompt: run.prompt,
            max_tokens: u32::try_from(run.max_tokens).unwrap_or(u32::MAX),
            ignore_eos: run.ignore_eos,
            sampling: run.sampling,
            logprobs: run.logprobs.map(|top| top as u16),
            forced: run.forced,
            capture_routes: run.capture_routes,
            capture_logits: run.capture_logits,
            ..Admission::default()
        };
        self.command(Command::Submit(admission))?;
        Ok(request)
    }

    pub(crate) fn command(&mut self, command: Command) -> Result<(), EngineError> {
        match self.commands.send(command) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.cause(EngineError::Internal("rank 0 is gone".into()))),
        }
    }

    /// The next thing that a rank tells.
    pub(crate) fn event(&mut self) -> Result<Event, EngineError> {
        match self.events.recv() {
            Ok(Event::Failed(error)) => Err(self.cause(error)),
            Ok(event) => Ok(event),
            Err(_) => Err(EngineError::Internal("all ranks are gone".into())),
        }
    }

    /// The next thing that a rank tells, or nothing within `wait`.
    pub(crate) fn event_within(&mut self, wait: Duration) -> Result<Option<Event>, EngineError> {
        match self.events.recv_timeout(wait) {
            Ok(Event::Failed(error)) => Err(self.cause(error)),
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(EngineError::Internal("all ranks are gone".into())),
        }
    }

    /// What wakes [`event_within`](Self::event_within) from outside.
    pub(crate) fn waker(&self) -> Sender<Event> {
        self.events_in.clone()
    }

    /// Everybody's counts since the last report, by rank.
    pub(crate) fn report(&mut self) -> Result<Vec<RankStats>, EngineError> {
        self.command(Command::Report)?;
        let mut reports: Vec<Option<RankStats>> = (0..self.options.ranks).map(|_| None).collect();
        while reports.iter().any(Option::is_none) {
            if let Event::Report(rank, stats) = self.event()? {
                reports[rank.index()] = Some(*stats);
            }
        }
        Ok(reports.into_iter().flatten().collect())
    }

    fn await_ready(&mut self) -> Result<(), EngineError> {
        let mut adapters: Vec<Option<String>> = vec![None; self.options.ranks];
        while adapters.iter().any(Option::is_none) {
            if let Event::Ready(rank, adapter) = self.event()? {
                adapters[rank.index()] = Some(adapter);
            }
        }
        self.adapters = adapters.into_iter().flatten().collect();
        Ok(())
    }

    /// The failure behind `first`: where one rank fails, the others only tell that they lost it.
    fn cause(&mut self, first: EngineError) -> EngineError {
        if !first.is_consequence() {
            return first;
        }
        let wait = Duration::from_millis(500);
        while let Ok(event) = self.events.recv_timeout(wait) {
            if let Event::Failed(other) = event
                && !other.is_consequence()
            {
                return other;
            }
        }
        first
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared<'_> {
    /// Every rank's weights on its device, the ranks side by side.
    fn load_all(&self) -> Result<Vec<Decoder>, EngineError> {
        std::thread::scope(|scope| {
            let ranks = (0..self.options.ranks).map(|rank| scope.spawn(move || self.load(Rank::from(rank))));
            let loading: Vec<_> = ranks.collect();
            let lost = |_| Err(EngineError::Internal("a loading thread panicked".into()));
            loading.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect()
        })
    }

    fn load(&self, rank: Rank) -> Result<Decoder, EngineError> {
        let failed = |source| match source {
            e @ (EngineError::Tensor { .. } | EngineError::File { .. } | EngineError::Usage { .. }) => e,
            other => EngineError::Rank { rank, source: Box::new(other) },
        };
        self.load_on(rank).map_err(failed)
    }

    fn load_on(&self, rank: Rank) -> Result<Decoder, EngineError> {
        let gpu = Gpu::open(self.options.adapter.as_deref(), rank.index())?;
        let layers = 0..self.spec.moe_layers();
        let experts: Vec<_> = layers.map(|l| self.table.experts_of(LayerId::from(l), rank)).collect();
        let held: usize = experts.iter().map(Vec::len).sum();
        let total = self.spec.elements(held);
        let stage = format!("load rank {rank}");
        let mut done = 0;
        let mut read = |elements| {
            done += elements;
            self.progress.update(&stage, done, total, "elements");
        };
        let held_as = (self.options.dtype, self.options.quant);
        let weights = ModelWeights::load(&self.spec, &self.store, &gpu, &experts, held_as, &mut read)?;
        Decoder::new(
            gpu,
            self.spec.clone(),
            weights,
            (cache_blocks(&self.options, &self.spec) * crate::runtime::BLOCK, self.options.kv_dtype.into()),
        )
    }

    fn spawn(
        &self,
        decoder: Decoder,
        comm: Box<dyn Communicator>,
        events: Sender<Event>,
        commands: Option<Receiver<Command>>,
    ) -> Result<JoinHandle<()>, EngineError> {
        let rank = comm.rank();
        let options = WorkerOptions {
            table: self.table.clone(),
            strategy: self.options.strategy,
            combine: self.options.combine,
            schedule: self.options.schedule,
            cache_blocks: cache_blocks(&self.options, &self.spec),
        };
        let failures = events.clone();
        let run = move || {
            let _guard = Panicking(rank, failures.clone());
            let worker = Worker::new(decoder, comm, options, events, commands);
            if let Err(source) = worker.run() {
                let _ = failures.send(Event::Failed(EngineError::Rank { rank, source: Box::new(source) }));
            }
        };
        std::thread::Builder::new()
            .name(format!("rank {rank}"))
            .spawn(run)
            .map_err(|e| EngineError::Internal(format!("no thread for rank {rank}: {e}")))
    }
}

/// Tells the driver where a rank's thread ends by a panic: nobody else would.
struct Panicking(Rank, Sender<Event>);

impl Drop for Panicking {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let source = Box::new(EngineError::Internal("its thread panicked".into()));
            let _ = self.1.send(Event::Failed(EngineError::Rank { rank: self.0, source }));
        }
    }
}

fn cache_blocks(options: &ClusterOptions, spec: &ModelSpec) -> usize {
    let positions = (CACHE_CONTEXTS * spec.max_positions).min(CACHE_POSITIONS);
    options.cache_positions.unwrap_or(positions).div_ceil(crate::runtime::BLOCK).max(1)
}

fn check_ranks(options: &ClusterOptions, spec: &ModelSpec) -> Result<(), EngineError> {
    let (ranks, experts) = (options.ranks, spec.experts);
    if ranks == 0 {
        return Err(EngineError::usage("0 ranks", "use at least 1"));
    }
    if ranks > experts {
        let what = format!("{ranks} ranks for {experts} experts a layer");
        return Err(EngineError::usage(what, format!("use at most {experts} ranks")));
    }
    Ok(())
}

fn resolve_placement(options: &ClusterOptions, spec: &ModelSpec) -> Result<PlacementTable, EngineError> {
    let (layers, experts, ranks) = (spec.moe_layers(), spec.experts, options.ranks);
    let fits = |table: &PlacementTable| table.check_fits(layers, experts, ranks, Some(&spec.digest));
    match &options.placement {
        PlacementSource::RoundRobin => Ok(PlacementTable::round_robin(layers, experts, ranks)),
        PlacementSource::Linear => Ok(PlacementTable::linear(layers, experts, ranks)),
        PlacementSource::Table(table) => {
            fits(table)?;
            Ok(table.clone())
        }
        PlacementSource::File(path) => {
            let remedy = "make one for this model and world size with `exflow place`";
            let shape = exflow_placement::TableShape { experts, ranks: Some(ranks) };
            let table = PlacementTable::read(path, Some(shape))
                .map_err(|e| EngineError::file(path, format!("no placement table: {e}"), remedy))?;
            fits(&table).map_err(|e| EngineError::file(path, e.to_string(), remedy))?;
            Ok(table)
        }
    }
}

fn join(options: &ClusterOptions) -> Result<Vec<Box<dyn Communicator>>, EngineError> {
    fn boxed<C: Communicator + 'static>(comms: Vec<C>) -> Vec<Box<dyn Communicator>> {
        comms.into_iter().map(|c| Box::new(c) as Box<dyn Communicator>).collect()
    }
    Ok(match options.transport {
        TransportKind::Local => boxed(exflow_transport::local::world(options.ranks)),
        TransportKind::Quic => {
            let loopback = exflow_transport::quic::QuicOptions::loopback();
            let quic = exflow_transport::quic::QuicOptions { link: options.link, ..loopback };
            boxed(exflow_transport::quic::loopback_world(options.ranks, quic)?)
        }
    })
}

//! The ranks of this process: their devices and weights, kept over epochs, and the threads that run them.

use super::numerics;
use super::plan::Plan;
use super::sizing::Sizes;
use crate::EngineError;
use crate::gpu::Gpu;
use crate::model::ModelSpec;
use crate::model::decoder::Decoder;
use crate::options::{ClusterOptions, Numerics, Progress};
use crate::runtime::{BLOCK, Command, Ended, Event, Outlet, Stock, Verdicts, Worker, WorkerOptions};
use crate::selftest::open_fast;
use crate::weights::{self, ModelWeights, Shelf, Store};
use exflow_placement::{ExpertId, LayerId, PlacementTable, Rank, Strategy};
use exflow_transport::Communicator;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;

/// The ranks of this process.
pub(crate) struct Host {
    pub(crate) options: ClusterOptions,
    pub(crate) spec: ModelSpec,
    store: Arc<Store>,
    /// In order; taken out while they run.
    hosted: Vec<Option<Decoder>>,
    /// What the first of them found out, as rank 0 where it is that.
    verdicts: Verdicts,
}

/// Experts of this process's ranks, over all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Read from disk.
    read: usize,
    /// On their devices already.
    kept: usize,
}

impl std::fmt::Display for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} experts read, {} kept", self.read, self.kept)
    }
}

/// Where the news of this process's ranks go.
#[derive(Clone)]
pub(crate) enum News {
    /// To the driver, which is here.
    Driver(Sender<Event>),
    /// To rank 0's process.
    Away,
}

impl Host {
    /// Opens the model; nothing is loaded yet.
    pub(crate) fn new(options: ClusterOptions) -> Result<Self, EngineError> {
        let mut spec = ModelSpec::read(&options.model)?;
        let store = Store::open(&options.model)?;
        weights::check(&spec, &store)?;
        spec.packed_experts |= store.packs_experts();
        spec.digest = store.digest(&options.model);
        let hosted = (0..options.ranks).map(|_| None).collect();
        Ok(Self { options, spec, store: Arc::new(store), hosted, verdicts: Verdicts::default() })
    }

    /// Brings every rank's weights onto its device, the ranks side by side: all of them at first, later the experts
    /// that the plan gives it and that it has not. `first`: this process's first rank.
    pub(crate) fn load(
        &mut self,
        plan: &Plan,
        first: Rank,
        progress: &dyn Progress,
    ) -> Result<Loaded, EngineError> {
        plan.apply(&mut self.options);
        let Self { options, spec, store, hosted, .. } = self;
        let loader = Loader { options, spec, store, plan, progress };
        std::thread::scope(|scope| {
            let loading: Vec<_> = hosted
                .iter_mut()
                .enumerate()
                .map(|(local, hosted)| {
                    let rank = Rank::from(first.index() + local);
                    let loader = &loader;
                    scope.spawn(move || loader.bring(rank, local, hosted))
                })
                .collect();
            let lost = |_| Err(EngineError::Internal("a loading thread panicked".into()));
            let mut all = Loaded::default();
            for thread in loading {
                let loaded = thread.join().unwrap_or_else(lost)?;
                (all.read, all.kept) = (all.read + loaded.read, all.kept + loaded.kept);
            }
            Ok(all)
        })
    }

    /// The kind of numerics by which this process's ranks do make products: fast ones are exact where nothing is left that they
    /// would form in another way.
    pub(crate) fn numerics(&self) -> Numerics {
        let forms = numerics::forms(&self.options, &self.spec);
        let mut on_units = self.hosted.iter().flatten().map(|decoder| decoder.gpu.on_units());
        match self.options.numerics {
            Numerics::Fast if on_units.any(|of| numerics::is_fast(&forms, of)) => Numerics::Fast,
            _ => Numerics::Exact,
        }
    }

    /// Where ranks find experts while they run, and what room there is for them.
    fn stock(&self, plan: &Plan) -> Stock {
        let sizes = Sizes::of(&self.options, &self.spec, Some(plan.cache_blocks));
        Stock {
            store: Arc::clone(&self.store),
            held_as: (plan.dtype, plan.quant),
            expert_bytes: sizes.expert,
            most_bytes: self.options.memory.map(|memory| sizes.for_experts(memory, plan.cache_blocks)),
            ranks_here: self.hosted.len() as u64,
        }
    }

    /// Starts the ranks; rank 0, where it is here, takes `commands`.
    pub(crate) fn start(
        &mut self,
        comms: Vec<Box<dyn Communicator>>,
        plan: &Plan,
        news: &News,
        commands: Option<Receiver<Command>>,
    ) -> Result<Running, EngineError> {
        let mut commands = commands;
        let mut known = self.verdicts.take(plan.strategy, &plan.table);
        let mut threads = Vec::new();
        for (local, comm) in comms.into_iter().enumerate() {
            let rank = comm.rank();
            let Some(decoder) = self.hosted.get_mut(local).and_then(Option::take) else {
                return Err(EngineError::Internal(format!("rank {rank} has nothing loaded")));
            };
            let options = WorkerOptions {
                table: plan.table.clone(),
                stock: self.stock(plan),
                strategy: plan.strategy,
                combine: plan.combine,
                schedule: plan.schedule,
                prefill: plan.prefill,
                overlap: plan.overlap,
                linger: self.options.linger,
                kv_wire: plan.kv_wire,
                groups: plan.groups.clone(),
                cache_blocks: plan.cache_blocks,
                steps_together: self.options.steps_together.map(|steps| steps.max(1)),
                halving: std::mem::take(&mut known),
            };
            let (news, commands) = (news.clone(), commands.take());
            let run = move || {
                let _guard = Panicking(news.clone());
                let outlet = match &news {
                    News::Driver(events) => Outlet::Driver(events.clone()),
                    News::Away => Outlet::away(),
                };
                let mut ended = Worker::new(decoder, comm, options, outlet, commands).run();
                ended.again = ended.again.map_err(|source| source.at(rank));
                if ended.again.is_err() {
                    tell_failed(&news);
                }
                ended
            };
            let thread = std::thread::Builder::new().name(format!("rank {rank}")).spawn(run);
            let none = |e| EngineError::Internal(format!("no thread for rank {rank}: {e}"));
            threads.push(thread.map_err(none)?);
        }
        Ok(Running { threads, strategy: plan.strategy, table: plan.table.clone() })
    }
}

/// Has the driver look why a rank has ended.
fn tell_failed(news: &News) {
    if let News::Driver(events) = news {
        let _ = events.send(Event::Failed);
    }
}

/// Tells the driver where a rank's thread ends by a panic: nobody else would.
struct Panicking(News);

impl Drop for Panicking {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell_failed(&self.0);
        }
    }
}

/// The ranks of this process while they run.
pub(crate) struct Running {
    threads: Vec<JoinHandle<Ended>>,
    /// What they began with.
    strategy: Strategy,
    table: PlacementTable,
}

impl Running {
    /// Waits until all have ended and gives their devices and weights back to the host; tells whether another epoch
    /// follows in order. A failure of one of them says more than that others lost somebody.
    pub(crate) fn finish(self, host: &mut Host) -> Result<bool, EngineError> {
        let mut first: Result<bool, EngineError> = Ok(false);
        for (local, thread) in self.threads.into_iter().enumerate() {
            let ended = match thread.join() {
                Ok(Ended { decoder, halving, again }) => {
                    host.hosted[local] = Some(decoder);
                    if local == 0 {
                        host.verdicts.keep(self.strategy, self.table.clone(), halving);
                    }
                    again
                }
                Err(_) => Err(EngineError::Internal("a rank's thread panicked".into())),
            };
            let says_more = |error: &EngineError| match &first {
                Ok(_) => true,
                Err(known) => known.is_loss() && !error.is_loss(),
            };
            match ended {
                Ok(again) => first = first.map(|before| before || again),
                Err(error) if says_more(&error) => first = Err(error),
                Err(_) => {}
            }
        }
        first
    }
}

/// What loading needs to know.
struct Loader<'a> {
    options: &'a ClusterOptions,
    spec: &'a ModelSpec,
    store: &'a Store,
    plan: &'a Plan,
    progress: &'a dyn Progress,
}

impl Loader<'_> {
    fn bring(&self, rank: Rank, local: usize, hosted: &mut Option<Decoder>) -> Result<Loaded, EngineError> {
        let failed = |source| match source {
            e @ (EngineError::Tensor { .. } | EngineError::File { .. } | EngineError::Usage { .. }) => e,
            other => other.at(rank),
        };
        let experts = experts_of(&self.plan.table, rank);
        let all = experts.iter().map(Vec::len).sum();
        let read = match hosted {
            Some(there) => self.replace(rank, there, experts),
            None => self.whole(rank, local, experts).map(|new| {
                *hosted = Some(new);
                all
            }),
        };
        let read = read.map_err(failed)?;
        Ok(Loaded { read, kept: all - read })
    }

    fn whole(&self, rank: Rank, local: usize, held: Vec<Vec<ExpertId>>) -> Result<Decoder, EngineError> {
        let held_as = (self.options.dtype, self.options.quant);
        let wanted = self.options.adapter_of(local);
        let mut gpu = match self.options.numerics {
            Numerics::Exact => Gpu::open(wanted, local)?,
            Numerics::Fast => open_fast(wanted, local, (self.plan.on_units, self.spec.expert.activation))?,
        };
        gpu.limit_chunks(self.options.chunk_bytes);
        gpu.set_draws(self.options.draws_on_device);
        let total = self.spec.elements(held.iter().map(Vec::len).sum());
        let mut read = self.counter(format!("load rank {rank}"), total);
        let weights = ModelWeights::load(self.spec, self.store, &gpu, &held, held_as, &mut read)?;
        let cache = (self.plan.cache_blocks * BLOCK, self.options.kv_dtype.into());
        let decoder = Decoder::new(gpu, self.spec.clone(), weights, cache)?;
        let shares = self.plan.table.ranks > 1;
        if self.options.warm_up.unwrap_or(shares) {
            decoder.warm_up(shares)?;
        }
        Ok(decoder)
    }

    /// Other experts than before, of which those are read that were not there, beside a cache of the plan's size.
    /// Returns how many were read.
    fn replace(
        &self,
        rank: Rank,
        decoder: &mut Decoder,
        experts: Vec<Vec<ExpertId>>,
    ) -> Result<usize, EngineError> {
        let count = fresh(&experts, &decoder.weights.held());
        let total = self.spec.elements(count) - self.spec.elements(0);
        let mut read = self.counter(format!("load rank {rank} anew"), total);
        decoder.size_cache(self.plan.cache_blocks * BLOCK)?;
        let held_as = (self.options.dtype, self.options.quant);
        let shelf = Shelf { spec: self.spec, store: self.store, held_as };
        decoder.weights.replace_experts(shelf, &decoder.gpu, &experts, &mut read)?;
        Ok(count)
    }

    fn counter(&self, stage: String, total: u64) -> impl FnMut(u64) {
        let mut done = 0;
        move |elements| {
            done += elements;
            self.progress.update(&stage, done, total, "elements");
        }
    }
}

/// How many experts `now` has over all layers that `before` has not.
fn fresh(now: &[Vec<ExpertId>], before: &[Vec<ExpertId>]) -> usize {
    now.iter().zip(before).flat_map(|(now, before)| now.iter().filter(|e| !before.contains(e))).count()
}

/// The experts of each MoE layer that a rank holds.
fn experts_of(table: &PlacementTable, rank: Rank) -> Vec<Vec<ExpertId>> {
    (0..table.layers).map(|layer| table.experts_of(LayerId::from(layer), rank)).collect()
}

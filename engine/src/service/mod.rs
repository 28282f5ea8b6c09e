//! The engine as many threads use it: a thread of its own owns the cluster, requests come and go while others run.

mod live;
mod owner;
mod replacing;
mod routes;

use crate::generate::{Completion, Request, TokenEvent, check_request};
use crate::options::Progress;
use crate::runtime::{Event, FinishReason};
use crate::{Cluster, ClusterOptions, EngineError, ModelSpec, TextCodec};
use exflow_placement::{Affinity, PlacementTable};
use exflow_transport::quic::Suspects;
pub use live::{LiveRank, LiveStats, MoveCounts, RequestCounts};
use owner::{Ask, Owner};
use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedReceiver;

/// How an [`Engine`] takes requests.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Most requests that may wait for their first token; further ones are refused with [`EngineError::Busy`].
    pub max_waiting: usize,
    /// Whether the routes of every request are counted for [`Engine::affinity`], not only of those that ask for
    /// their path.
    pub count_routes: bool,
    /// Whether experts move while requests run, where the text of late calls for another table and it pays: routes are
    /// counted for it.
    pub replace_live: bool,
    /// Tokens after which it is looked whether it pays, which is also when a count weighs half; `None`: as many as make a
    /// profile, 100 for each expert of a layer with top-1.
    pub replace_every: Option<usize>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_waiting: 256, count_routes: false, replace_live: false, replace_every: None }
    }
}

/// A running model that many threads can use at once. Clones are the same engine; the last one to go ends it.
///
/// ```no_run
/// use exflow_engine::{ClusterOptions, Engine, EngineOptions, NoProgress, Request};
///
/// # fn main() -> Result<(), exflow_engine::EngineError> {
/// let engine = Engine::start(ClusterOptions::new("model"), EngineOptions::default(), &NoProgress)?;
/// let request = Request { prompt_ids: vec![1, 2, 3], max_tokens: 16, ..Request::default() };
/// for event in engine.submit(request)? {
///     print!("{}", event?.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// Ends the owner's thread when the last handle goes.
struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What handles, receivers and the owner's thread share.
struct Shared {
    spec: ModelSpec,
    cluster: ClusterOptions,
    options: EngineOptions,
    codec: Option<Arc<TextCodec>>,
    adapters: Vec<String>,
    cache_positions: usize,
    suspects: Suspects,
    wake: Mutex<Sender<Event>>,
    asks: Mutex<VecDeque<Ask>>,
    state: Mutex<State>,
}

/// What changes while the engine runs.
struct State {
    next: u64,
    live: LiveStats,
    affinity: Affinity,
    table: PlacementTable,
    /// Why no request is taken any more.
    ended: Option<Ended>,
}

#[derive(Debug, Clone)]
enum Ended {
    /// Told to finish what runs.
    Closing,
    /// A rank failed.
    Failed(String),
}

impl Engine {
    /// Loads the model and starts the thread that owns it.
    ///
    /// # Errors
    /// Those of [`Cluster::start`].
    pub fn start(
        mut cluster: ClusterOptions,
        options: EngineOptions,
        progress: &dyn Progress,
    ) -> Result<Self, EngineError> {
        cluster.warm_up.get_or_insert(true);
        Self::over(Cluster::start(cluster, progress)?, options)
    }

    /// Takes over a cluster that runs already.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn over(cluster: Cluster, options: EngineOptions) -> Result<Self, EngineError> {
        let spec = cluster.spec().clone();
        let affinity = Affinity::zeros(spec.moe_layers(), spec.experts);
        let live = LiveStats::new(cluster.options().ranks);
        let shared = Arc::new(Shared {
            cluster: cluster.options().clone(),
            options,
            codec: cluster.codec(),
            adapters: cluster.adapters(),
            cache_positions: cluster.cache_positions(),
            suspects: cluster.suspects(),
            wake: Mutex::new(cluster.waker()),
            asks: Mutex::default(),
            state: Mutex::new(State {
                next: 0,
                live,
                affinity,
                table: cluster.placement().clone(),
                ended: None,
            }),
            spec,
        });
        let owner = Owner::new(cluster, shared.clone());
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || owner.run())
            .map_err(|e| EngineError::Internal(format!("no thread for the engine: {e}")))?;
        Ok(Self { inner: Arc::new(Inner { shared, thread: Mutex::new(Some(thread)) }) })
    }

    /// Starts a request beside those that run. Its tokens come from what is returned; dropping that cancels it.
    ///
    /// # Errors
    /// A request that this model cannot run ([`EngineError::is_input`]), [`EngineError::Busy`] where too many
    /// wait, [`EngineError::Stopped`] where the engine is closing or a rank failed.
    pub fn submit(&self, request: Request) -> Result<Tokens, EngineError> {
        let shared = &self.inner.shared;
        check_request(&shared.spec, shared.cache_positions, &request)?;
        if !request.stop.is_empty() && shared.codec.is_none() {
            return Err(EngineError::usage("stop texts for a model without a tokenizer", "leave them out"));
        }
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        let prompt_ids = request.prompt_ids.clone();
        let id = {
            let mut state = shared.state();
            if let Some(ended) = &state.ended {
                return Err(EngineError::Stopped { cause: ended.to_string() });
            }
            let (waiting, limit) = (state.live.waiting, shared.options.max_waiting);
            if waiting >= limit {
                state.live.requests.refused += 1;
                return Err(EngineError::Busy { waiting, limit });
            }
            state.live.requests.submitted += 1;
            state.live.waiting += 1;
            state.next += 1;
            state.next
        };
        shared.ask(Ask::Submit { id, request, events, asked: Instant::now() });
        Ok(Tokens { id, receiver, shared: shared.clone(), prompt_ids, done: false })
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.shared.spec
    }

    /// The model's tokenizer, where its folder has one.
    pub fn text(&self) -> Option<&TextCodec> {
        self.inner.shared.codec.as_deref()
    }

    /// Where each expert is now.
    pub fn placement(&self) -> PlacementTable {
        self.inner.shared.state().table.clone()
    }

    /// Has experts move to where `table` has them, while requests run on: none of them notices, and no token changes. How
    /// it ends is told in [`LiveStats::moves`].
    ///
    /// # Errors
    /// A table that is not for this model and so many ranks.
    pub fn move_to(&self, table: PlacementTable) -> Result<(), EngineError> {
        let shared = &self.inner.shared;
        let spec = &shared.spec;
        table.check_fits(spec.moe_layers(), spec.experts, shared.cluster.ranks, Some(&spec.digest))?;
        shared.state().live.moves.asked += 1;
        shared.ask(Ask::Move(Box::new(table)));
        Ok(())
    }

    /// What the cluster was started with.
    pub fn options(&self) -> &ClusterOptions {
        &self.inner.shared.cluster
    }

    /// How requests are taken.
    pub fn engine_options(&self) -> &EngineOptions {
        &self.inner.shared.options
    }

    /// Each rank's adapter.
    pub fn adapters(&self) -> &[String] {
        &self.inner.shared.adapters
    }

    /// Positions of KV cache on each rank.
    pub fn cache_positions(&self) -> usize {
        self.inner.shared.cache_positions
    }

    /// What happens right now, and counts since the start.
    pub fn live(&self) -> LiveStats {
        let mut live = self.inner.shared.state().live.clone();
        for rank in self.inner.shared.suspects.ranks() {
            if let Some(rank) = live.ranks.get_mut(rank.index()) {
                rank.suspect = true;
            }
        }
        live
    }

    /// Which expert followed which in the requests whose routes were counted.
    pub fn affinity(&self) -> Affinity {
        self.inner.shared.state().affinity.clone()
    }

    /// Why no further request is taken, where that is so.
    pub fn ended(&self) -> Option<String> {
        self.inner.shared.state().ended.as_ref().map(Ended::to_string)
    }

    /// Takes no further requests, waits until those that run have ended, and ends the ranks.
    pub fn finish(&self) {
        self.inner.shared.state().ended.get_or_insert(Ended::Closing);
        self.inner.shared.ask(Ask::Finish);
        self.inner.join();
    }
}

impl Inner {
    fn join(&self) {
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join(); // a panic there is told to every request as a lost engine
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.state().ended.get_or_insert(Ended::Closing);
        self.shared.ask(Ask::Stop);
        self.join();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn ask(&self, ask: Ask) {
        lock(&self.asks).push_back(ask);
        let _ = lock(&self.wake).send(Event::Wake); // an owner that is gone has told everybody
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closing => f.write_str("it is shutting down"),
            Self::Failed(cause) => f.write_str(cause),
        }
    }
}

/// A lock whose holder panicked holds counts and queues that are whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tokens of one request as they come. Dropping it ends the request and frees its cache.
///
/// As an iterator it blocks; [`next_event`](Self::next_event) waits without blocking a thread.
pub struct Tokens {
    id: u64,
    receiver: UnboundedReceiver<Result<TokenEvent, EngineError>>,
    shared: Arc<Shared>,
    prompt_ids: Vec<u32>,
    done: bool,
}

impl Tokens {
    /// The next token; `None` after the one that says why the sequence ended.
    pub async fn next_event(&mut self) -> Option<Result<TokenEvent, EngineError>> {
        if self.done {
            return None;
        }
        let event = self.receiver.recv().await;
        self.note(event)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Where a rank failed on the way.
    pub fn complete(mut self) -> Result<Completion, EngineError> {
        let started = Instant::now();
        let (mut output_ids, mut text, mut ttft_ms) = (Vec::new(), String::new(), None);
        let mut logprobs: Option<Vec<_>> = None;
        let mut finish_reason = FinishReason::Length;
        for event in self.by_ref() {
            let event = event?;
            ttft_ms.get_or_insert_with(|| 1e3 * started.elapsed().as_secs_f64());
            text += &event.text;
            if !event.ends_text {
                output_ids.push(event.token);
                if let Some(told) = event.logprobs {
                    logprobs.get_or_insert_default().push(told);
                }
            }
            finish_reason = event.finish.unwrap_or(finish_reason);
        }
        let prompt_ids = std::mem::take(&mut self.prompt_ids);
        let ttft_ms = ttft_ms.unwrap_or(0.0);
        Ok(Completion { prompt_ids, output_ids, text, logprobs, finish_reason, ttft_ms })
    }

    fn note(
        &mut self,
        event: Option<Result<TokenEvent, EngineError>>,
    ) -> Option<Result<TokenEvent, EngineError>> {
        let event = event.unwrap_or_else(|| {
            let cause =
                self.shared.state().ended.as_ref().map_or("its thread is gone".into(), Ended::to_string);
            Err(EngineError::Stopped { cause })
        });
        self.done = event.as_ref().map_or(true, |e| e.finish.is_some());
        Some(event)
    }
}

impl Iterator for Tokens {
    type Item = Result<TokenEvent, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let event = self.receiver.blocking_recv();
        self.note(event)
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        if !self.done {
            self.shared.ask(Ask::Cancel(self.id));
        }
    }
}

//! Several ranks running one model, in this process and perhaps in others: the engine's public entry.

mod group;
mod host;
mod journal;
mod member;
mod moving;
pub(crate) mod numerics;
mod placing;
mod plan;
mod sizing;
mod tuning;

pub use member::work;

use crate::generate::{self, Run};
use crate::logits::{self, LogitsDump};
use crate::model::ModelSpec;
use crate::options::{ClusterOptions, Feed, NoProgress, Progress};
use crate::runtime::{Admission, BLOCK, Command, Event, RankStats};
use crate::text::TextCodec;
use crate::{EngineError, Generation, Request, TokenEvent};
use exflow_placement::{Affinity, PlacementTable, Rank, RoutingTrace};
use exflow_transport::quic::Suspects;
use group::{Group, World};
use host::{Host, News, Running};
use journal::Journal;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Several ranks running one model, rank 0 among them in this process.
///
/// Each rank is a thread with its own device, its own experts and its own end of the transport. Dropping the
/// cluster ends them all. With [`ClusterOptions::group`] further ranks are in other processes ([`work`]); if one is
/// lost, those that are left, or it itself when it is back, go on in a new epoch, and open requests are run again
/// from what was told of them to the same tokens.
pub struct Cluster {
    options: ClusterOptions,
    text: Result<Arc<TextCodec>, String>,
    host: Host,
    group: Group,
    table: PlacementTable,
    groups: Vec<u16>,
    /// Of KV cache on each rank, in the first epoch.
    cache_blocks: usize,
    adapters: Vec<String>,
    /// Ranks that are not there in this epoch.
    absent: Vec<Rank>,
    epoch: u32,
    running: Option<Running>,
    commands: Sender<Command>,
    events_in: Sender<Event>,
    events: Receiver<Event>,
    journal: Journal,
    /// Epochs since a token was told, and the tokens told then.
    fruitless: (u32, u64),
    /// Whether experts move.
    moves: bool,
}

/// So many epochs may fail one after the other without a token between them.
const FRUITLESS_EPOCHS: u32 = 8;

impl Cluster {
    /// Loads the model onto the ranks and joins them.
    ///
    /// # Errors
    /// Bad options, a model that cannot be read, a table that does not fit: errors for which
    /// [`EngineError::is_input`] holds. No adapter, no memory, no connection: others.
    pub fn start(options: ClusterOptions, progress: &dyn Progress) -> Result<Self, EngineError> {
        let mut host = Host::new(options)?;
        let (mut options, spec) = (host.options.clone(), &host.spec);
        let text = TextCodec::open(&options.model, spec.vocab_size).map(Arc::new).map_err(|e| e.to_string());
        let mut group = Group::new(&options, spec)?;
        let world = group.form(&options, spec, 0)?;
        host.load(&world.plan, Rank(0), progress)?;
        // All ranks make products as those here do, or none begins.
        options.numerics = host.numerics();
        let (events_in, events) = channel();
        let (commands, _) = channel();
        let mut cluster = Self {
            table: world.plan.table.clone(),
            groups: world.plan.groups.clone(),
            cache_blocks: world.plan.cache_blocks,
            options,
            text,
            host,
            group,
            adapters: Vec::new(),
            absent: Vec::new(),
            epoch: 0,
            running: None,
            commands,
            events_in,
            events,
            journal: Journal::default(),
            fruitless: (0, 0),
            moves: false,
        };
        let mut here: BTreeSet<Rank> = (0..world.comms.len()).map(Rank::from).collect();
        cluster.begin(world)?;
        while !here.is_empty() {
            // Of ranks in other processes the adapters' names came with their hellos.
            if let Event::Ready(rank, adapter) = cluster.event()? {
                here.remove(&rank);
                cluster.adapters[rank.index()] = adapter;
            }
        }
        Ok(cluster)
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.host.spec
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// Where tokenizer.json is missing or malformed; ids can be given all the same.
    pub fn text(&self) -> Result<&TextCodec, EngineError> {
        match &self.text {
            Ok(codec) => Ok(codec),
            // Read anew for the error itself, which cannot be kept and lent at once.
            Err(said) => Err(TextCodec::open(&self.options.model, self.spec().vocab_size)
                .err()
                .unwrap_or_else(|| EngineError::usage(said.clone(), "start again"))),
        }
    }

    /// The same, to be shared with other threads; `None` where ids are all there is.
    pub(crate) fn codec(&self) -> Option<Arc<TextCodec>> {
        self.text.as_ref().ok().cloned()
    }

    /// Positions of KV cache on each rank; what fits into the cache of the first epoch fits into that of every one.
    pub(crate) fn cache_positions(&self) -> usize {
        self.cache_blocks * BLOCK
    }

    /// Bytes of KV cache for a block of positions, at all layers together.
    pub(crate) fn block_bytes(&self) -> u64 {
        sizing::Sizes::of(&self.options, self.spec(), None).block_bytes()
    }

    /// `[R]` the group that each rank's sequences are bounded to ([`ClusterOptions::domain`]); empty: to none.
    pub fn groups(&self) -> &[u16] {
        &self.groups
    }

    /// Where each expert is, in this epoch.
    pub fn placement(&self) -> &PlacementTable {
        &self.table
    }

    /// What the cluster was started with; [`ClusterOptions::ranks`] are those of all processes.
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// Each rank's adapter.
    pub fn adapters(&self) -> Vec<String> {
        self.adapters.clone()
    }

    /// How often the world was made anew, because ranks were lost or came back.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Ranks that are lost and have not come back.
    pub fn absent(&self) -> &[Rank] {
        &self.absent
    }

    /// The ranks of which nothing was heard for a second, kept up to date while the cluster lives; it says early which
    /// process hangs or is cut off.
    pub fn suspects(&self) -> Suspects {
        self.group.suspects()
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
        generate::check_prompt(self.spec(), &run.prompt)?;
        generate::check_room(self.spec(), self.cache_positions(), run.prompt.len(), run.max_tokens)?;
        let admission = self.journal.open(Admission {
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
        });
        let request = admission.request;
        self.command(Command::Submit(admission))?;
        Ok(request)
    }

    /// Tells rank 0. Where it has failed, [`Cluster::event`] finds that out next, and what is open is submitted again.
    pub(crate) fn command(&mut self, command: Command) -> Result<(), EngineError> {
        match &command {
            Command::Cancel(request) => self.journal.close(*request),
            Command::Report => {
                self.journal.ask_reports((0..self.options.ranks).map(Rank::from));
                self.report_for(self.absent.iter().copied());
            }
            _ => {}
        }
        let _ = self.commands.send(command);
        Ok(())
    }

    /// Reports nothing for ranks that cannot do so themselves.
    fn report_for(&self, ranks: impl Iterator<Item = Rank>) {
        for rank in ranks {
            let _ = self.events_in.send(Event::Report(rank, Box::default()));
        }
    }

    /// The next thing that a rank tells. A lost rank makes a new epoch here, of which the caller notices a pause.
    pub(crate) fn event(&mut self) -> Result<Event, EngineError> {
        loop {
            let event = self.events.recv();
            let event = event.map_err(|_| EngineError::Internal("all ranks are gone".into()))?;
            if let Some(event) = self.take(event)? {
                return Ok(event);
            }
        }
    }

    /// The next thing that a rank tells, or nothing within `wait`.
    pub(crate) fn event_within(&mut self, wait: Duration) -> Result<Option<Event>, EngineError> {
        match self.events.recv_timeout(wait) {
            Ok(event) => self.take(event),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(EngineError::Internal("all ranks are gone".into())),
        }
    }

    fn take(&mut self, event: Event) -> Result<Option<Event>, EngineError> {
        if matches!(event, Event::Failed) {
            return self.go_on().map(|()| None);
        }
        self.journal.note(&event);
        if let Event::Moved(end) = &event {
            self.moved(end);
        }
        Ok(Some(event))
    }

    /// Takes note of which expert followed which in what it ran: with the profile that it was started with, this says
    /// where the experts of a lost rank go.
    pub(crate) fn learn(&self, counted: &Affinity) {
        if !self.group.goes_on() {
            return;
        }
        let mut known = counted.clone();
        if let Some(Err(error)) = self.options.affinity.as_deref().map(|profiled| known.merge(profiled, 1.0))
        {
            tracing::warn!(%error, "counts that do not go with the profile");
        }
        self.group.learn(known);
    }

    /// What wakes [`event_within`](Self::event_within) from outside.
    pub(crate) fn waker(&self) -> Sender<Event> {
        self.events_in.clone()
    }

    /// Everybody's counts since the last report, by rank; zeroes of those that are absent.
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

    /// Starts this process's ranks in a world whose experts they hold.
    fn begin(&mut self, world: World) -> Result<(), EngineError> {
        let World { plan, roster, epoch, comms, adapters } = world;
        let (commands, orders) = channel();
        self.options.ranks = roster.world_size();
        self.adapters = adapters;
        self.adapters.resize(self.options.ranks, String::new());
        self.absent = roster.absent();
        self.epoch = epoch;
        self.commands = commands;
        self.running =
            Some(self.host.start(comms, &plan, &News::Driver(self.events_in.clone()), Some(orders))?);
        (self.table, self.groups) = (plan.table, plan.groups);
        Ok(())
    }

    /// After a rank of this process has ended: finds out why, and makes the next epoch where others are to blame.
    fn go_on(&mut self) -> Result<(), EngineError> {
        let Some(running) = self.running.take() else { return Ok(()) }; // the word of a second rank
        // Rank 0 stops waiting for orders.
        self.commands = channel().0;
        let ended = running.finish(&mut self.host);
        let cause = ended.err().unwrap_or_else(|| EngineError::Internal("the ranks ended early".into()));
        if !self.group.goes_on() || !cause.is_loss() {
            return Err(cause);
        }
        let tokens = self.journal.tokens();
        let epochs = if self.fruitless.1 == tokens { self.fruitless.0 + 1 } else { 1 };
        self.fruitless = (epochs, tokens);
        if epochs > FRUITLESS_EPOCHS {
            return Err(cause);
        }
        self.tell(&format!("epoch {} is over: {cause}", self.epoch));
        let world = self.group.form(&self.options, &self.host.spec, self.epoch + 1)?;
        let loaded = self.host.load(&world.plan, Rank(0), &NoProgress)?;
        // What was told and not yet taken is made again.
        let left: Vec<Event> = self.events.try_iter().collect();
        if left.iter().any(|event| matches!(event, Event::Wake)) {
            let _ = self.events_in.send(Event::Wake);
        }
        self.begin(world)?;
        self.tell(&format!("{}; process 0: {loaded}", self.describe()));
        for admission in self.journal.replay() {
            self.command(Command::Submit(admission))?;
        }
        self.stop_moving();
        let reports = self.journal.take_reports();
        self.report_for(reports.into_iter());
        Ok(())
    }

    fn describe(&self) -> String {
        let ranks = self.options.ranks - self.absent.len();
        let absent: Vec<_> = self.absent.iter().map(Rank::to_string).collect();
        match absent.is_empty() {
            true => format!("epoch {}: all {ranks} ranks go on", self.epoch),
            false => format!("epoch {}: {ranks} ranks go on without rank {}", self.epoch, absent.join(", ")),
        }
    }

    fn tell(&self, what: &str) {
        if let Some(group) = &self.options.group {
            group.observer.tell(what);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop { again: false });
        if let Some(running) = self.running.take() {
            let _ = running.finish(&mut self.host);
        }
    }
}

//! The thread that owns the cluster: hands requests in, tokens out, and counts to those who look.

use super::live::Meter;
use super::replacing::Replacing;
use super::routes::{COUNT_AT, Routes};
use super::{Ended, EngineOptions, Shared, lock};
use crate::generate::{Request, Run, TokenEvent};
use crate::output::Output;
use crate::runtime::{Captured, Command, Event, FinishReason, MoveEnd};
use crate::sampling::Logprobs;
use crate::{Cluster, EngineError};
use exflow_placement::{Affinity, PlacementTable, Strategy};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// What handles ask of the owner.
pub(super) enum Ask {
    Submit {
        id: u64,
        request: Request,
        events: UnboundedSender<Result<TokenEvent, EngineError>>,
        asked: Instant,
    },
    Cancel(u64),
    Move(Box<PlacementTable>),
    /// End once nothing runs.
    Finish,
    /// End at once.
    Stop,
}

/// A request that runs or waits.
struct Open {
    id: u64,
    events: UnboundedSender<Result<TokenEvent, EngineError>>,
    stop: Vec<String>,
    output: Output,
    asked: Instant,
    path: bool,
}

pub(super) struct Owner {
    cluster: Cluster,
    shared: Arc<Shared>,
    /// By the cluster's own number of the sequence.
    open: HashMap<u32, Open>,
    routes: Routes,
    /// Where experts move by themselves.
    replacing: Option<Replacing>,
    meter: Meter,
    /// Whose table others know.
    epoch: u32,
    finishing: bool,
    stopping: bool,
}

/// Between two counts of the ranks while something runs.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// With nothing to do: asks wake it before.
const IDLE: Duration = Duration::from_secs(3600);

impl Owner {
    pub(super) fn new(cluster: Cluster, shared: Arc<Shared>) -> Self {
        let spec = cluster.spec();
        let replacing = replacing(&cluster, &shared.options);
        let count_at = replacing.as_ref().map_or(COUNT_AT, Replacing::count_at);
        let routes = Routes::new(spec.moe_layers(), spec.top_k, spec.experts, count_at);
        let meter = Meter::new(cluster.options().ranks, spec.moe_layers());
        let (open, epoch) = (HashMap::new(), cluster.epoch());
        let (finishing, stopping) = (false, false);
        Self { cluster, shared, open, routes, replacing, meter, epoch, finishing, stopping }
    }

    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            let cause = error.to_string();
            tracing::error!(%cause, "the engine stops");
            self.shared.state().ended = Some(Ended::Failed(cause));
        }
        // Whoever still waits sees its channel close, and reads why.
        self.open.clear();
        lock(&self.shared.asks).clear();
        let mut state = self.shared.state();
        state.ended.get_or_insert(Ended::Closing);
        (state.live.running, state.live.waiting) = (0, 0);
    }

    fn serve(&mut self) -> Result<(), EngineError> {
        loop {
            self.take_asks()?;
            if self.stopping || (self.finishing && self.open.is_empty()) {
                return Ok(());
            }
            let wait = match self.open.is_empty() && !self.meter.owes() {
                true => IDLE,
                false => REPORT_EVERY.saturating_sub(self.meter.since_report()),
            };
            match self.cluster.event_within(wait)? {
                Some(Event::Token { request, token, logprobs, finish }) => {
                    self.token(request, token, logprobs, finish)?;
                }
                Some(Event::Captured(captured)) => self.captured(captured),
                Some(Event::Moved(end)) => self.moved(*end),
                Some(Event::Report(rank, stats)) => {
                    self.replacing.iter_mut().for_each(|replacing| replacing.report(&stats));
                    self.meter.add(rank, &stats, &mut self.shared.state().live)
                }
                _ => {}
            }
            if self.cluster.epoch() != self.epoch {
                // A lost rank's experts are elsewhere.
                self.epoch = self.cluster.epoch();
                self.shared.state().table = self.cluster.placement().clone();
            }
            self.replace()?;
            if self.meter.is_due(REPORT_EVERY, !self.open.is_empty()) {
                self.cluster.command(Command::Report)?;
                self.meter.asked();
            }
        }
    }

    fn take_asks(&mut self) -> Result<(), EngineError> {
        loop {
            let ask = lock(&self.shared.asks).pop_front();
            match ask {
                None => return Ok(()),
                Some(Ask::Submit { id, request, events, asked }) => {
                    self.submit(id, request, events, asked)?
                }
                Some(Ask::Cancel(id)) => self.cancel(id)?,
                Some(Ask::Move(table)) => self.move_to(*table)?,
                Some(Ask::Finish) => self.finishing = true,
                Some(Ask::Stop) => self.stopping = true,
            }
        }
    }

    fn submit(
        &mut self,
        id: u64,
        request: Request,
        events: UnboundedSender<Result<TokenEvent, EngineError>>,
        asked: Instant,
    ) -> Result<(), EngineError> {
        let (stop, path) = (request.stop.clone(), request.path);
        let prompt = request.prompt_ids.len();
        let counted = path || self.shared.options.count_routes || self.replacing.is_some();
        let run = Run { capture_routes: counted, ..Run::of(request) };
        match self.cluster.submit(run) {
            Ok(sequence) => {
                self.meter.wake();
                self.shared.state().live.prompt_tokens += prompt as u64;
                if counted {
                    self.routes.open(sequence, prompt);
                }
                let output = Output::default();
                self.open.insert(sequence, Open { id, events, stop, output, asked, path });
            }
            Err(error) if error.is_input() => {
                let mut state = self.shared.state();
                state.live.waiting -= 1;
                state.live.requests.failed += 1;
                drop(state);
                let _ = events.send(Err(error)); // nobody waits: nobody to tell
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn cancel(&mut self, id: u64) -> Result<(), EngineError> {
        let Some((&sequence, _)) = self.open.iter().find(|(_, open)| open.id == id) else { return Ok(()) };
        self.cluster.command(Command::Cancel(sequence))?;
        self.close(sequence, |requests| requests.cancelled += 1);
        Ok(())
    }

    fn move_to(&mut self, table: PlacementTable) -> Result<(), EngineError> {
        match self.cluster.move_to(table) {
            Err(error) if error.is_input() => {
                self.moved(MoveEnd::refused(error.to_string()));
                Ok(())
            }
            asked => asked,
        }
    }

    fn moved(&mut self, end: MoveEnd) {
        self.replacing.iter_mut().for_each(|replacing| replacing.ended(&end));
        let mut state = self.shared.state();
        let moves = &mut state.live.moves;
        match end.outcome {
            Ok(table) => {
                moves.done += 1;
                moves.experts += end.experts;
                moves.seconds += end.seconds;
                moves.tokens += end.tokens;
                state.table = table;
            }
            Err(why) => {
                moves.refused += 1;
                moves.why = Some(why);
            }
        }
    }

    /// Forgets a request that is over.
    fn close(&mut self, sequence: u32, count: impl FnOnce(&mut super::RequestCounts)) {
        let Some(open) = self.open.remove(&sequence) else { return };
        self.meter.touch();
        let mut state = self.shared.state();
        match open.output.first {
            Some(_) => state.live.running -= 1,
            None => state.live.waiting -= 1,
        }
        count(&mut state.live.requests);
        drop(state);
        let counted = self.routes.close(sequence, self.open.is_empty());
        self.learn(counted);
    }

    /// Takes in routes that were counted.
    fn learn(&mut self, counted: Option<Affinity>) {
        let Some(counts) = counted else { return };
        self.replacing.iter_mut().for_each(|replacing| replacing.count(&counts));
        let mut state = self.shared.state();
        match state.affinity.merge(&counts, 1.0) {
            Ok(()) => self.cluster.learn(&state.affinity),
            Err(error) => tracing::warn!(%error, "routes that cannot be counted"),
        }
    }

    /// Has experts move, where they do so by themselves and it is time for it.
    fn replace(&mut self) -> Result<(), EngineError> {
        let Some(replacing) = &mut self.replacing else { return Ok(()) };
        if let Some(table) = replacing.found() {
            self.shared.state().live.moves.asked += 1;
            return self.move_to(table);
        }
        if !self.cluster.moves() && self.cluster.absent().is_empty() {
            let owner = lock(&self.shared.wake).clone();
            // An owner that has ended needs no waking.
            replacing.look(self.cluster.placement(), move || drop(owner.send(Event::Wake)));
        }
        Ok(())
    }

    fn token(
        &mut self,
        sequence: u32,
        token: u32,
        logprobs: Option<Logprobs>,
        finish: Option<FinishReason>,
    ) -> Result<(), EngineError> {
        let Some(open) = self.open.get_mut(&sequence) else { return Ok(()) }; // it ran over its end
        let first = open.output.first.is_none();
        let now = open.asked.elapsed().as_secs_f64();
        let before = open.output.last;
        let codec = self.shared.codec.as_deref();
        let text = open.output.push(codec, &open.stop, token, finish, now)?;
        let ends_text = finish == Some(FinishReason::Stop);
        let path = if open.path { self.routes.path_of_token(sequence) } else { Vec::new() };
        let finished = open.output.finish;
        let event = TokenEvent { sequence: 0, token, text, logprobs, finish: finished, ends_text, path };
        let events = open.events.clone();
        self.meter.token(first, now, now - before, &mut self.shared.state().live);
        if !first {
            self.replacing.iter_mut().for_each(|replacing| replacing.token(now - before));
        }
        let counted = self.routes.step(sequence);
        self.learn(counted);
        if finished.is_some() {
            if finish.is_none() {
                self.cluster.command(Command::Cancel(sequence))?; // a stop text
            }
            self.close(sequence, |requests| requests.finished += 1);
        }
        // Told last: whoever sees the end finds it counted.
        let gone = events.send(Ok(event)).is_err();
        if gone && finished.is_none() {
            self.cluster.command(Command::Cancel(sequence))?;
            self.close(sequence, |requests| requests.cancelled += 1);
        }
        Ok(())
    }

    fn captured(&mut self, captured: Captured) {
        if let Captured::Route { rank, request: sequence, position, layer, experts, weights } = captured {
            self.routes.add(rank, sequence, position, layer, experts, weights);
        }
    }
}

/// What has experts move by themselves, where that was asked for and there is anywhere to move to.
fn replacing(cluster: &Cluster, options: &EngineOptions) -> Option<Replacing> {
    let spec = cluster.spec();
    if !options.replace_live || cluster.options().ranks < 2 {
        return None;
    }
    if cluster.options().strategy == Strategy::Vanilla {
        tracing::warn!("experts stay where they are: under vanilla no token stays with its expert");
        return None;
    }
    let shape = (spec.moe_layers(), spec.experts, spec.top_k, cluster.expert_bytes());
    Some(Replacing::new(shape, options.replace_every, cluster.options().schedule))
}

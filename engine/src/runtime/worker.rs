//! The loop of one rank: agree on what runs, step, gather what was sampled, again.

use super::coherence::Coherence;
use super::sequence::{Admission, FinishReason, Sequences};
use super::stats::RankStats;
use super::step::{Batch, Outcome, Row, Stepper};
use crate::EngineError;
use crate::model::decoder::Decoder;
use crate::options::Combine;
use exflow_placement::{PlacementTable, Rank, Strategy};
use exflow_transport::{ByteClass, Communicator, RoundId, WireStats};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

/// What the driver asks of rank 0.
pub(crate) enum Command {
    /// Run a sequence; its home is set at admission.
    Submit(Admission),
    /// End a sequence that nobody waits for any more.
    Cancel(u32),
    /// Have every rank report its counts, and start counting anew.
    Report,
    /// End every rank.
    Stop,
}

/// What ranks tell the driver.
pub(crate) enum Event {
    /// A rank holds its weights and has joined the others.
    Ready(Rank, String),
    /// Rank 0: a token counts.
    Token { sequence: u32, token: u32, finish: Option<FinishReason> },
    /// Something that was to be captured.
    Captured(Captured),
    /// Counts since the last report.
    Report(Rank, Box<RankStats>),
    /// A rank failed.
    Failed(EngineError),
}

/// Routes and logits handed to the driver.
#[derive(Debug, Clone)]
pub(crate) enum Captured {
    Route { sequence: u32, position: u32, layer: u16, experts: Vec<u32>, weights: Vec<f32> },
    Logits { position: u32, values: Vec<f32> },
}

/// What rank 0 decides, for all ranks to carry out before the next step.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Directive {
    Admit(Admission),
    Cancel(u32),
    Report,
    Stop,
}

/// What every rank tells every other one at the end of a step.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Gathered {
    sampled: Vec<(u32, u32)>,
    directives: Vec<Directive>,
}

/// What a rank's loop is told at its start.
pub(crate) struct WorkerOptions {
    pub(crate) table: PlacementTable,
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) cache_blocks: usize,
}

/// One rank.
pub(crate) struct Worker {
    decoder: Decoder,
    comm: Box<dyn Communicator>,
    options: WorkerOptions,
    events: Sender<Event>,
    /// Rank 0's alone.
    commands: Option<Receiver<Command>>,
    waiting: VecDeque<Admission>,
    sequences: Sequences,
    coherence: Coherence,
    stats: RankStats,
    reported: WireStats,
    round: u64,
    stopping: bool,
}

/// Tokens of prompts in one step, on all ranks together.
const PREFILL_TOKENS: usize = 1024;
/// With nothing to do, ranks still meet so often: it keeps every rank's wait below its deadline.
const IDLE: Duration = Duration::from_secs(2);

impl Worker {
    pub(crate) fn new(
        decoder: Decoder,
        comm: Box<dyn Communicator>,
        options: WorkerOptions,
        events: Sender<Event>,
        commands: Option<Receiver<Command>>,
    ) -> Self {
        let spec = &decoder.spec;
        let sequences = Sequences::new(options.cache_blocks, spec.max_positions, spec.eos.clone());
        Self {
            decoder,
            reported: comm.stats(),
            comm,
            options,
            events,
            commands,
            waiting: VecDeque::new(),
            sequences,
            coherence: Coherence::default(),
            stats: RankStats::default(),
            round: 0,
            stopping: false,
        }
    }

    /// Runs until rank 0 says stop.
    pub(crate) fn run(mut self) -> Result<(), EngineError> {
        self.gather(Gathered::default())?; // all have their weights
        self.tell(Event::Ready(self.comm.rank(), self.decoder.gpu.name().to_owned()));
        while !self.stopping {
            let outcome = self.step()?;
            let directives = self.decide();
            for captured in outcome.captured {
                self.tell(Event::Captured(captured));
            }
            self.gather(Gathered { sampled: outcome.sampled, directives })?;
        }
        Ok(())
    }

    fn tell(&self, event: Event) {
        // A driver that went away is noticed by rank 0, which stops the world.
        let _ = self.events.send(event);
    }

    /// Prompts first, else one token of every sequence, else nothing.
    fn step(&mut self) -> Result<Outcome, EngineError> {
        let me = self.comm.rank();
        let prompts = self.sequences.to_prefill(PREFILL_TOKENS);
        let batch = match prompts.is_empty() {
            false => self.prompt_batch(&prompts, me),
            true => self.decode_batch(me),
        };
        if batch.total == 0 {
            return Ok(Outcome::default());
        }
        let (started, before) = (Instant::now(), self.comm.stats());
        let mut stepper = Stepper {
            decoder: &mut self.decoder,
            comm: self.comm.as_mut(),
            table: &self.options.table,
            strategy: self.options.strategy,
            combine: self.options.combine,
            sequences: &self.sequences,
            coherence: &mut self.coherence,
            stats: &mut self.stats,
            round: &mut self.round,
        };
        let outcome = match batch.tokens.is_empty() && self.options.table.ranks == 1 {
            true => Outcome::default(),
            false => stepper.run(&batch)?,
        };
        let wire = self.comm.stats().since(&before);
        self.stats.add_step(batch.decode, &wire);
        match batch.decode {
            true => {
                self.stats.decode_steps += 1;
                self.stats.decode_tokens += batch.tokens.len() as u64;
                self.stats.decode_seconds += started.elapsed().as_secs_f64();
            }
            false => self.stats.prefill_steps += 1,
        }
        Ok(outcome)
    }

    fn prompt_batch(&self, prompts: &[u32], me: Rank) -> Batch {
        let mut batch = Batch { decode: false, tokens: Vec::new(), total: 0 };
        for sequence in prompts.iter().filter_map(|id| self.sequences.running.get(id)) {
            let prompt = &sequence.start.prompt;
            batch.total += prompt.len();
            if sequence.start.home == me {
                let row = |(at, &token)| (Row::new(sequence.start.id, at as u32), token);
                batch.tokens.extend(prompt.iter().enumerate().map(row));
            }
        }
        batch
    }

    fn decode_batch(&self, me: Rank) -> Batch {
        let mut batch = Batch { decode: true, tokens: Vec::new(), total: 0 };
        for (&id, sequence) in &self.sequences.running {
            let Some((token, position)) = sequence.next_token() else { continue };
            batch.total += 1;
            if sequence.residence == me {
                batch.tokens.push((Row::new(id, position), token));
            }
        }
        batch
    }

    /// Rank 0: what the driver asked for, as far as there is room. Waits where there is nothing else to do.
    fn decide(&mut self) -> Vec<Directive> {
        let Some(commands) = &self.commands else { return Vec::new() };
        let mut directives = Vec::new();
        let mut take = |command, waiting: &mut VecDeque<Admission>| match command {
            Command::Submit(admission) => waiting.push_back(admission),
            Command::Cancel(sequence) => directives.push(Directive::Cancel(sequence)),
            Command::Report => directives.push(Directive::Report),
            Command::Stop => directives.push(Directive::Stop),
        };
        if self.sequences.running.is_empty() && self.waiting.is_empty() {
            match commands.recv_timeout(IDLE) {
                Ok(command) => take(command, &mut self.waiting),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => take(Command::Stop, &mut self.waiting),
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => take(command, &mut self.waiting),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    take(Command::Stop, &mut self.waiting);
                    break;
                }
            }
        }
        directives.extend(self.admissions());
        directives
    }

    /// The waiting sequences that fit, each at home on the rank with the fewest context tokens. Only as many as
    /// surely fit after those of this very round: one step's worth.
    fn admissions(&mut self) -> Vec<Directive> {
        let mut context = vec![0usize; self.comm.world_size()];
        for sequence in self.sequences.running.values() {
            context[sequence.start.home.index()] += sequence.start.prompt.len() + sequence.output.len();
        }
        let mut needed = 0;
        let mut admitted = Vec::new();
        while let Some(next) = self.waiting.front() {
            needed += next.prompt.len() + next.max_tokens as usize + super::BLOCK;
            let first_fits = admitted.is_empty() && self.fits_alone(next);
            if !first_fits && !self.sequences.fits(needed, 0) {
                break;
            }
            let Some(mut admission) = self.waiting.pop_front() else { break };
            let home = (0..context.len()).min_by_key(|&rank| context[rank]).unwrap_or(0);
            context[home] += admission.prompt.len();
            admission.home = Rank::from(home);
            admitted.push(Directive::Admit(admission));
        }
        admitted
    }

    fn fits_alone(&self, admission: &Admission) -> bool {
        self.sequences.fits(admission.prompt.len(), admission.max_tokens as usize)
    }

    /// Everybody's sampled ids and rank 0's directives, carried out by everybody in the same order.
    fn gather(&mut self, mine: Gathered) -> Result<(), EngineError> {
        let round = RoundId { number: self.round, class: ByteClass::Ids, layer: u16::MAX };
        self.round += 1;
        let bytes = postcard::to_stdvec(&mine).map_err(|e| EngineError::Internal(e.to_string()))?;
        let all = self.comm.all_gather(round, bytes)?;
        for (from, bytes) in all.iter().enumerate() {
            let from = Rank::from(from);
            let gathered: Gathered = postcard::from_bytes(bytes)
                .map_err(|e| EngineError::Internal(format!("rank {from} sent what cannot be read: {e}")))?;
            for (sequence, token) in gathered.sampled {
                self.count(sequence, token, from);
            }
            for directive in gathered.directives {
                self.carry_out(from, directive)?;
            }
        }
        Ok(())
    }

    fn count(&mut self, sequence: u32, token: u32, residence: Rank) {
        let Some((token, finish)) = self.sequences.sampled(sequence, token, residence) else { return };
        if finish.is_some() {
            self.coherence.forget(sequence);
        }
        if self.comm.rank() == Rank(0) {
            self.tell(Event::Token { sequence, token, finish });
        }
    }

    fn carry_out(&mut self, from: Rank, directive: Directive) -> Result<(), EngineError> {
        if from != Rank(0) {
            return Err(EngineError::Internal(format!("rank {from} gave an order; only rank 0 does")));
        }
        match directive {
            Directive::Admit(admission) => {
                let id = admission.id;
                if !self.sequences.admit(admission) {
                    return Err(EngineError::Internal(format!("no cache blocks left for sequence {id}")));
                }
            }
            Directive::Cancel(sequence) => {
                self.sequences.cancel(sequence);
                self.coherence.forget(sequence);
            }
            Directive::Report => self.report(),
            Directive::Stop => self.stopping = true,
        }
        Ok(())
    }

    fn report(&mut self) {
        let now = self.comm.stats();
        let mut stats = std::mem::take(&mut self.stats);
        stats.wire = now.since(&self.reported);
        self.reported = now;
        self.tell(Event::Report(self.comm.rank(), Box::new(stats)));
    }
}

//! One rank: what it holds, what rank 0 orders, what it tells the driver. The loops are in files of their own.

use super::coherence::Coherence;
use super::sequence::{Admission, FinishReason, Sequences};
use super::stats::RankStats;
use crate::EngineError;
use crate::model::decoder::Decoder;
use crate::options::Combine;
use exflow_placement::{PlacementTable, Rank, Strategy};
use exflow_transport::{Communicator, WireStats};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

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
    /// Nothing from the ranks: the driver itself is to look after something else.
    Wake,
}

/// Routes and logits handed to the driver.
#[derive(Debug, Clone)]
pub(crate) enum Captured {
    Route { rank: Rank, sequence: u32, position: u32, layer: u16, experts: Vec<u32>, weights: Vec<f32> },
    Logits { position: u32, values: Vec<f32> },
}

/// What rank 0 decides, for all ranks to carry out before the next step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Directive {
    Admit(Admission),
    Cancel(u32),
    Report,
    Stop,
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
    pub(super) decoder: Decoder,
    pub(super) comm: Box<dyn Communicator>,
    pub(super) options: WorkerOptions,
    pub(super) events: Sender<Event>,
    /// Rank 0's alone.
    pub(super) commands: Option<Receiver<Command>>,
    pub(super) waiting: VecDeque<Admission>,
    pub(super) sequences: Sequences,
    pub(super) coherence: Coherence,
    pub(super) stats: RankStats,
    pub(super) reported: WireStats,
    pub(super) round: u64,
    pub(super) stopping: bool,
}

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
    pub(crate) fn run(self) -> Result<(), EngineError> {
        self.run_rounds()
    }

    pub(super) fn tell(&self, event: Event) {
        // A driver that went away is noticed by rank 0, which stops the world.
        let _ = self.events.send(event);
    }

    /// Rank 0: what the driver asked for, as far as there is room. Waits where there is nothing else to do.
    pub(super) fn decide(&mut self) -> Vec<Directive> {
        let Some(commands) = &self.commands else { return Vec::new() };
        let mut directives = Vec::new();
        let mut take = |command, waiting: &mut VecDeque<Admission>| match command {
            Command::Submit(admission) => waiting.push_back(admission),
            Command::Cancel(sequence) => {
                waiting.retain(|admission: &Admission| admission.id != sequence);
                directives.push(Directive::Cancel(sequence));
            }
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

    pub(super) fn count(&mut self, sequence: u32, token: u32, residence: Rank) {
        let Some((token, finish)) = self.sequences.sampled(sequence, token, residence) else { return };
        if finish.is_some() {
            self.coherence.forget(sequence);
        }
        if self.comm.rank() == Rank(0) {
            self.tell(Event::Token { sequence, token, finish });
        }
    }

    pub(super) fn carry_out(&mut self, from: Rank, directive: Directive) -> Result<(), EngineError> {
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
        stats.kv_blocks = self.sequences.blocks();
        stats.memory_bytes = self.decoder.gpu.allocated_bytes();
        self.tell(Event::Report(self.comm.rank(), Box::new(stats)));
    }
}

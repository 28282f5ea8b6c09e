//! One rank: what it holds, what rank 0 orders, what it tells the driver. The loops are in files of their own.

use super::coherence::Coherence;
use super::frames::Payloads;
use super::measure::Measured;
use super::moving::{Director, GLANCE, MoveEnd, MoveOrder, Moving, Stock};
use super::outlet::Outlet;
use super::overlap::{Halving, Peers};
use super::scheduler::Scheduler;
use super::sequence::{Admission, FinishReason, Order, Sampled, Sequences};
use super::stats::RankStats;
use super::step::{Bulk, Stepper};
use super::tables::Tables;
use crate::EngineError;
use crate::model::decoder::Decoder;
use crate::model::scratch::Scratch;
use crate::options::{Combine, KvWire, Linger, Overlap, Prefill, Schedule};
use crate::sampling::Logprobs;
use exflow_placement::{PlacementTable, Rank, Strategy};
use exflow_transport::{Communicator, WireStats};
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

/// What the driver asks of rank 0.
pub(crate) enum Command {
    /// Run a request; its id and home are set when it starts.
    Submit(Admission),
    /// End a request that nobody waits for any more.
    Cancel(u32),
    /// Have every rank report its counts, and start counting anew.
    Report,
    /// Have every rank measure its links and its kernels; nothing may run, and the schedule must be rounds.
    Measure,
    /// Have experts move to where this table has them, while requests run.
    Move(Box<PlacementTable>),
    /// End every rank; `again`: another epoch follows at once.
    Stop { again: bool },
}

/// What ranks tell the driver.
pub(crate) enum Event {
    /// A rank holds its weights and has joined the others.
    Ready(Rank, String),
    /// Rank 0: a token counts.
    Token { request: u32, token: u32, logprobs: Option<Logprobs>, finish: Option<FinishReason> },
    /// Something that was to be captured.
    Captured(Captured),
    /// Counts since the last report.
    Report(Rank, Box<RankStats>),
    /// What a rank was asked to measure.
    Measured(Rank, Box<Measured>),
    /// Rank 0: how a move that was asked for ended.
    Moved(Box<MoveEnd>),
    /// A rank of this process has ended in an error, which its thread returns.
    Failed,
    /// Nothing from the ranks: the driver itself is to look after something else.
    Wake,
}

/// Routes and logits handed to the driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Captured {
    Route { rank: Rank, request: u32, position: u32, layer: u16, experts: Vec<u32>, weights: Vec<f32> },
    Logits { position: u32, values: Vec<f32> },
}

/// What rank 0 decides, for all ranks to carry out before the next step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Directive {
    Order(Order),
    Report,
    Measure,
    /// In rounds: whether decode steps run in two halves from now on.
    Halves(bool),
    Move(MoveOrder),
    Stop {
        again: bool,
    },
}

/// What a rank's loop is told at its start.
pub(crate) struct WorkerOptions {
    /// The one to begin with.
    pub(crate) table: PlacementTable,
    pub(crate) stock: Stock,
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) schedule: Schedule,
    pub(crate) prefill: Prefill,
    pub(crate) overlap: Overlap,
    /// This process's own.
    pub(crate) linger: Linger,
    pub(crate) kv_wire: KvWire,
    /// `[R]` the group that each rank's sequences are bounded to; empty: to none.
    pub(crate) groups: Vec<u16>,
    pub(crate) cache_blocks: usize,
    /// Decode steps that are submitted as one, where this is the only rank; `None`: by what they take.
    pub(crate) steps_together: Option<usize>,
    /// What rank 0 knows from epochs before.
    pub(crate) halving: Halving,
}

/// A rank's loop that has ended.
pub(crate) struct Ended {
    /// The device with its weights.
    pub(crate) decoder: Decoder,
    /// What it found out.
    pub(crate) halving: Halving,
    /// Whether another epoch follows.
    pub(crate) again: Result<bool, EngineError>,
}

/// One rank.
pub(crate) struct Worker {
    pub(super) decoder: Decoder,
    pub(super) comm: Box<dyn Communicator>,
    pub(super) options: WorkerOptions,
    pub(super) tables: Tables,
    pub(super) moving: Moving,
    /// Rank 0's part of a move.
    pub(super) director: Director,
    pub(super) outlet: Outlet,
    /// Rank 0's alone.
    pub(super) commands: Option<Receiver<Command>>,
    /// Rank 0's policy; other ranks do not ask it.
    pub(super) scheduler: Scheduler,
    pub(super) sequences: Sequences,
    pub(super) coherence: Coherence,
    pub(super) stats: RankStats,
    pub(super) reported: WireStats,
    pub(super) round: u64,
    /// Rows and partials that are being put together.
    pub(super) payloads: Payloads,
    /// In rounds: keys and values that are.
    pub(super) bulk: Bulk,
    /// Of prompts, and of decode steps.
    pub(super) peers: [Peers; 2],
    /// Rank 0's verdict, and what all ranks do by its order.
    pub(super) halving: Halving,
    pub(super) in_halves: bool,
    /// What the second half of a step works in.
    pub(super) second: Option<Scratch>,
    pub(super) stopping: bool,
    /// Whether another epoch follows at once.
    pub(super) again: bool,
    /// Ranks have news for the driver that only the next gathering brings: rank 0 does not rest before it.
    pub(super) behind: bool,
}

/// What a driver that is gone would have said.
pub(super) const STOP: Command = Command::Stop { again: false };

/// With nothing to do, ranks still meet so often: it keeps every rank's wait below its deadline.
const IDLE: Duration = Duration::from_secs(2);

impl Worker {
    pub(crate) fn new(
        decoder: Decoder,
        comm: Box<dyn Communicator>,
        mut options: WorkerOptions,
        outlet: Outlet,
        commands: Option<Receiver<Command>>,
    ) -> Self {
        let spec = &decoder.spec;
        let remade_beyond = spec.attention.rope.as_ref().and_then(|rope| rope.remade_beyond());
        let sequences = Sequences::new(options.cache_blocks, spec.max_positions, spec.eos.clone())
            .remade_beyond(remade_beyond);
        let there = |rank: &Rank| !comm.absent().contains(rank);
        let homes = (0..options.table.ranks).map(Rank::from).filter(there).collect();
        let scheduler = Scheduler::new(homes, spec.vocab_size);
        let options_halves = options.overlap == Overlap::Halves;
        Self {
            decoder,
            reported: comm.stats(),
            payloads: Payloads::new(comm.world_size()),
            bulk: Bulk::new(comm.world_size()),
            comm,
            tables: Tables::new(options.table.clone()),
            moving: Moving::default(),
            director: Director::default(),
            halving: std::mem::take(&mut options.halving),
            options,
            outlet,
            commands,
            scheduler,
            sequences,
            coherence: Coherence::default(),
            stats: RankStats::default(),
            round: 0,
            peers: Default::default(),
            in_halves: options_halves,
            second: None,
            stopping: false,
            again: false,
            behind: false,
        }
    }

    /// Runs until rank 0 says stop, or something fails.
    pub(crate) fn run(mut self) -> Ended {
        let remade = self.decoder.remake(self.options.kv_wire == KvWire::Hidden);
        // One rank has nobody to wait for: a whole step is one submission.
        let ended = remade.and_then(|()| match (self.options.schedule, self.comm.world_size()) {
            (Schedule::Flow, 2..) => self.run_flow(),
            _ => self.run_rounds(),
        });
        Ended { decoder: self.decoder, halving: self.halving, again: ended.map(|()| self.again) }
    }

    /// What a step of this rank works with.
    pub(super) fn stepper(&mut self) -> Stepper<'_> {
        Stepper {
            decoder: &mut self.decoder,
            comm: self.comm.as_mut(),
            tables: &self.tables,
            strategy: self.options.strategy,
            combine: self.options.combine,
            prefill: self.options.prefill,
            overlap: self.options.overlap,
            groups: &self.options.groups,
            sequences: &self.sequences,
            coherence: &mut self.coherence,
            stats: &mut self.stats,
            round: &mut self.round,
            peers: &mut self.peers,
            payloads: &mut self.payloads,
        }
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.outlet.tell(event);
    }

    /// Rank 0: what the driver asked for and what the scheduler makes of it. Waits where there is nothing else to do.
    pub(super) fn decide(&mut self) -> Vec<Directive> {
        let Some(commands) = &self.commands else { return Vec::new() };
        let (mut directives, mut moves) = (Vec::new(), Vec::new());
        let mut take = |command, scheduler: &mut Scheduler| match command {
            Command::Submit(admission) => scheduler.submit(admission),
            Command::Cancel(request) => scheduler.cancel(request),
            Command::Report => directives.push(Directive::Report),
            Command::Measure => directives.push(Directive::Measure),
            Command::Move(table) => moves.push(*table),
            Command::Stop { again } => directives.push(Directive::Stop { again }),
        };
        if self.sequences.running.is_empty() && self.scheduler.is_idle() && !self.behind {
            match commands.recv_timeout(if self.director.is_busy() { GLANCE } else { IDLE }) {
                Ok(command) => take(command, &mut self.scheduler),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => take(STOP, &mut self.scheduler),
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => take(command, &mut self.scheduler),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    take(STOP, &mut self.scheduler);
                    break;
                }
            }
        }
        let begun: Vec<_> = moves.into_iter().filter_map(|table| self.begin_move(table)).collect();
        directives.extend(begun.into_iter().chain(self.next_of_move()).map(Directive::Move));
        directives.extend(self.scheduler.plan(&self.sequences).into_iter().map(Directive::Order));
        directives
    }

    pub(super) fn count(&mut self, sampled: Sampled) {
        let counted = self.sequences.sampled(sampled.sequence, sampled.token);
        self.sequences.went_by(sampled.sequence, sampled.edition);
        let Some(counted) = counted.filter(|c| c.new && self.comm.rank() == Rank(0)) else { return };
        self.director.token();
        self.tell(Event::Token {
            request: counted.request,
            token: counted.token,
            logprobs: sampled.logprobs,
            finish: counted.finish,
        });
    }

    pub(super) fn carry_out(&mut self, from: Rank, directive: Directive) -> Result<(), EngineError> {
        if from != Rank(0) {
            return Err(EngineError::Internal(format!("rank {from} gave an order; only rank 0 does")));
        }
        match directive {
            Directive::Order(order) => {
                let preempts = matches!(order, Order::Preempt(_));
                if let Some(gone) = self.sequences.apply(order)? {
                    self.coherence.forget(gone.start.id);
                    if preempts && self.comm.rank() == Rank(0) {
                        self.scheduler.put_back(gone);
                    }
                }
            }
            Directive::Report => {
                self.report();
                self.behind = true;
            }
            Directive::Measure => {
                self.measure()?;
                self.behind = true;
            }
            Directive::Halves(on) => self.in_halves = on,
            Directive::Move(order) => self.carry_out_move(order)?,
            Directive::Stop { again } => (self.stopping, self.again) = (true, again),
        }
        Ok(())
    }

    fn report(&mut self) {
        let now = self.comm.stats();
        let mut stats = std::mem::take(&mut self.stats);
        stats.wire = now.since(&self.reported);
        self.reported = now;
        stats.kv_blocks = self.sequences.blocks();
        stats.kv_peak_blocks = self.sequences.take_peak();
        stats.kernels_made = self.decoder.gpu.take_made();
        stats.matrix_side = self.decoder.gpu.side_in_use() as u64;
        stats.memory_bytes = self.decoder.gpu.allocated_bytes();
        self.tell(Event::Report(self.comm.rank(), Box::new(stats)));
    }
}

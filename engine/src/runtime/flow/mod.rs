//! The loop of `--schedule flow`: no exchange is a barrier. A rank works on whatever tokens are ready, at whatever
//! layer; a token whose next expert is here waits for nobody, one that leaves is sent at once; keys and values go in the
//! background, sampled ids are one message to all, and so are rank 0's orders.
//!
//! The same rows move by the same route plan as in rounds, and kernels give a row the same bits whatever else is in a
//! batch; so tokens and logits are the same.

pub(crate) mod board;
mod depart;
mod hop;
mod items;
mod linger;
#[cfg(test)]
mod made_up;
mod notes;
mod orders;

pub(crate) use depart::latencies;

use super::coherence::{Arrived, Coherence};
use super::frames::{KvRow, Reader};
use super::moving;
use super::sequence::Sequences;
use super::step::Bulk;
use super::worker::{STOP, Worker};
use crate::EngineError;
use crate::options::Prefill;
use board::{Board, Lack, Picked, Standing, Unit};
use exflow_placement::{LayerId, Rank};
use exflow_transport::{ByteClass, Message};
use linger::Lingering;
use notes::{Note, Notes};
use std::time::{Duration, Instant};

/// Rank 0 looks so often for what the driver asks while it waits for other ranks.
const GLANCE: Duration = Duration::from_millis(1);
/// The others wait for messages alone.
const REST: Duration = Duration::from_millis(500);
/// With nothing to do at all, rank 0 waits for the driver, and looks so often for messages.
const IDLE: Duration = Duration::from_millis(20);
/// How long a token may wait for partials, contexts or blocks while nothing else happens.
const STALLED: Duration = Duration::from_secs(30);
/// Keys and values wait for so many hops that they may travel together, unless the rank rests before or there are so
/// many bytes: a token needs them only when it comes by again.
pub(crate) const BULK_HOPS: u32 = 4;
pub(crate) const BULK_BYTES: usize = 16 << 10;

/// What the loop holds beside the rank's own state.
pub(super) struct Flow {
    board: Board<Waiting>,
    notes: Notes,
    /// Keys and values for positions that no block was granted for yet.
    unplaced: Vec<(u16, Arrived)>,
    /// Keys and values of decoded tokens on their way out, and the hops that they have waited for.
    bulk: (Bulk, u32),
    linger: Lingering,
    /// How long what is ready is held back yet, where it is.
    held: Option<Duration>,
    /// Rank 0: whether something happened that its policy should look at.
    changed: bool,
    /// When the loop last did or heard anything.
    lively: Instant,
    born: Instant,
}

impl Flow {
    /// Tells the board the time.
    fn tick(&mut self) -> Duration {
        let now = self.born.elapsed();
        self.board.tick(now);
        now
    }
}

impl Flow {
    /// A sampled id was counted.
    fn heard(&mut self, sequences: &Sequences) {
        self.changed = true;
        self.linger.heard(self.born.elapsed(), sequences.running.len());
    }
}

/// Of a sequence that is not known yet.
pub(super) enum Waiting {
    Kv(u16, Arrived),
    Note(Rank, Note),
}

impl Worker {
    pub(super) fn run_flow(&mut self) -> Result<(), EngineError> {
        self.meet()?;
        let me = self.comm.rank();
        let mut flow = Flow {
            board: Board::new(me).apart(self.replicates()),
            notes: Notes::new(me),
            unplaced: Vec::new(),
            bulk: (Bulk::new(self.comm.world_size()), 0),
            linger: Lingering::new(self.options.linger),
            held: None,
            changed: false,
            lively: Instant::now(),
            born: Instant::now(),
        };
        while !self.stopping {
            self.receive(&mut flow, Duration::ZERO)?;
            self.move_on()?;
            self.order(&mut flow)?;
            self.send_news()?;
            let began = Instant::now();
            let now = flow.tick();
            match self.pick(&mut flow, now) {
                Some(picked) => {
                    self.hop(&mut flow, picked, began)?;
                    self.stats.busy_seconds += began.elapsed().as_secs_f64();
                    flow.lively = Instant::now();
                }
                None => {
                    self.rest(&mut flow)?;
                    self.stats.idle_seconds += began.elapsed().as_secs_f64();
                    if flow.held.is_some() {
                        self.stats.linger_seconds += began.elapsed().as_secs_f64();
                    }
                }
            }
        }
        self.part()
    }

    /// Waits for something to happen.
    fn rest(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        if self.stopping {
            return Ok(());
        }
        if let Some(held) = flow.held {
            flow.lively = Instant::now();
            return self.receive(flow, if self.commands.is_some() { held.min(GLANCE) } else { held });
        }
        self.send_waiting_bulk(flow)?;
        if flow.board.is_empty() {
            flow.lively = Instant::now();
        } else if flow.lively.elapsed() > STALLED {
            let (sequence, position, layer, missing) = flow.board.waiting().unwrap_or_default();
            return Err(EngineError::Internal(format!(
                "sequence {sequence} at position {position} waited {} s to enter layer {layer}: {}",
                STALLED.as_secs(),
                match missing {
                    0 => "its context did not arrive".to_owned(),
                    missing => format!("{missing} partials did not arrive"),
                }
            )));
        }
        let wait = match &self.commands {
            Some(_) if !self.sequences.running.is_empty() => GLANCE,
            Some(commands) => match commands.recv_timeout(IDLE) {
                Ok(command) => {
                    self.take_command(flow, command)?;
                    Duration::ZERO
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Duration::ZERO,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    self.take_command(flow, STOP)?;
                    Duration::ZERO
                }
            },
            None => REST,
        };
        self.receive(flow, if self.moving.is_busy() { wait.min(moving::GLANCE) } else { wait })
    }

    /// Takes in all messages that are there; waits for the first one up to `wait`.
    fn receive(&mut self, flow: &mut Flow, mut wait: Duration) -> Result<(), EngineError> {
        loop {
            if self.stopping {
                return Ok(());
            }
            match self.comm.recv_message(wait)? {
                Some(message) => self.take_in(flow, message)?,
                None => return Ok(()),
            }
            flow.lively = Instant::now();
            wait = Duration::ZERO;
        }
    }

    fn take_in(&mut self, flow: &mut Flow, message: Message) -> Result<(), EngineError> {
        flow.tick();
        let Message { from, class, layer, payload } = message;
        let spec = &self.decoder.spec;
        let hidden = spec.hidden;
        match class {
            ByteClass::Ids => {
                let note = postcard::from_bytes(&payload).map_err(|e| {
                    EngineError::Internal(format!("rank {from} sent what cannot be read: {e}"))
                })?;
                self.take_note(flow, from, note)?;
            }
            ByteClass::Kv => {
                let (width, form) = self.decoder.kv_wire();
                let rows = Reader::new(&payload, from).kv(width, form)?;
                for KvRow { layer, sequence, position, values } in rows {
                    check_layer(usize::from(layer), self.decoder.spec.layers, from)?;
                    let arrived = Arrived { sequence, position, values };
                    if let Some(Waiting::Kv(layer, arrived)) =
                        flow.board.other(sequence, Waiting::Kv(layer, arrived))
                    {
                        self.place(flow, layer, arrived)?;
                    }
                }
            }
            _ => {
                check_layer(usize::from(layer), spec.layers, from)?;
                let mut reader = Reader::new(&payload, from);
                let prefill = reader.u16()? != 0;
                if class == ByteClass::Dispatch {
                    reader.rows(hidden)?.into_iter().for_each(|row| flow.board.row(layer, prefill, row));
                } else {
                    reader.partials(hidden)?.into_iter().for_each(|p| flow.board.partial(layer, p));
                }
            }
        }
        Ok(())
    }

    /// Keys and values for the cache: they wait where no block was granted for their position yet.
    fn place(&mut self, flow: &mut Flow, layer: u16, arrived: Arrived) -> Result<(), EngineError> {
        let Some(sequence) = self.sequences.running.get(&arrived.sequence) else { return Ok(()) };
        if sequence.slot(arrived.position).is_none() {
            flow.unplaced.push((layer, arrived));
            return Ok(());
        }
        let (id, prompt) = (arrived.sequence, sequence.start.prompt.len() as u32);
        let (home, of_prompt) = (sequence.start.home, arrived.position < prompt);
        self.coherence.receive(layer, arrived);
        if of_prompt && flow.notes.owes(id) && self.holds(id, home, prompt) {
            flow.notes.acknowledged(id);
            self.note_to(home, &Note::Holds(id))?;
        }
        Ok(())
    }

    /// Whether the whole prompt is here at every layer that this rank is in the domain of.
    pub(super) fn holds(&self, sequence: u32, home: Rank, prompt: u32) -> bool {
        let me = self.comm.rank();
        (0..self.decoder.spec.layers)
            .filter(|&layer| self.domain(layer, home).contains(&me))
            .all(|layer| self.coherence.is_complete(layer as u16, sequence, prompt))
    }

    /// Whether every rank prefills every prompt.
    fn replicates(&self) -> bool {
        self.options.prefill == Prefill::Replicated
    }

    fn domain(&self, layer: usize, home: Rank) -> Vec<Rank> {
        let before = self.decoder.spec.moe_before(layer).map(LayerId::from);
        self.tables.domain(&self.options.groups, before, home)
    }

    fn take_note(&mut self, flow: &mut Flow, from: Rank, note: Note) -> Result<(), EngineError> {
        match note {
            Note::Orders(directives) => {
                for directive in directives {
                    self.obey(flow, from, directive)?;
                }
            }
            Note::Sampled(ref sampled, index) => {
                let sequence = sampled.sequence;
                if flow.board.standing(sequence) != Standing::Running {
                    flow.board.other(sequence, Waiting::Note(from, note));
                    return Ok(());
                }
                flow.notes.sampled(sampled.clone(), index);
                self.count_in_order(flow, sequence);
            }
            Note::Holds(sequence) => flow.notes.holds(sequence, from),
            Note::News(news) => news.into_iter().for_each(|news| self.tell(news.event(from))),
            Note::Moved(news) => self.director.hear(from, news),
            Note::Goodbye => {}
        }
        Ok(())
    }

    /// What the driver is to know goes to rank 0, from a rank of another process; and what rank 0 is to know.
    fn send_news(&mut self) -> Result<(), EngineError> {
        for news in std::mem::take(&mut self.moving.news) {
            match self.comm.rank() {
                Rank(0) => self.director.hear(Rank(0), news),
                _ => self.note_to(Rank(0), &Note::Moved(news))?,
            }
        }
        loop {
            let (news, more) = self.outlet.take();
            if !news.is_empty() {
                self.note_to(Rank(0), &Note::News(news))?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// Takes note of the sampled ids of a sequence as far as none is missing.
    fn count_in_order(&mut self, flow: &mut Flow, sequence: u32) {
        while let Some(running) = self.sequences.running.get(&sequence) {
            let Some(sampled) = flow.notes.next(sequence, running.output.len() as u32) else {
                return;
            };
            self.count(sampled);
            flow.heard(&self.sequences);
        }
    }

    /// What is to be done now; nothing also where what is ready is held back.
    fn pick(&self, flow: &mut Flow, now: Duration) -> Option<Picked> {
        let layers = self.decoder.spec.layers;
        let (sequences, coherence) = (&self.sequences, &self.coherence);
        flow.held = None;
        let running = sequences.running.len();
        if running == 0 {
            flow.linger.rested();
        }
        let ready = flow.board.ready(|unit| lack(sequences, coherence, layers, unit))?;
        flow.held = flow.linger.left(&ready, running);
        if flow.held.is_some() {
            flow.board.hold();
            return None;
        }
        let picked = flow.board.take(ready);
        flow.linger.launched(now, &picked);
        Some(picked)
    }
}

/// What a unit that has all its partials still needs on this rank.
fn lack(sequences: &Sequences, coherence: &Coherence, layers: usize, unit: &Unit) -> Lack {
    let (first, last) = (&unit.tokens[0], &unit.tokens[unit.tokens.len() - 1]);
    let Some(sequence) = sequences.running.get(&first.sequence) else { return Lack::Ids };
    if unit.stage == layers {
        // Limits and penalties go by what was sampled before, of which all must have been heard.
        let heard = unit.prefill || sequence.tokens() > last.position as usize;
        return if heard { Lack::Nothing } else { Lack::Ids };
    }
    let (layer, position) = (unit.stage as u16, first.position);
    match (sequence.slot(last.position), coherence.is_complete(layer, first.sequence, position)) {
        (None, _) => Lack::Ids,
        (_, false) => Lack::Context,
        _ => Lack::Nothing,
    }
}

fn check_layer(layer: usize, layers: usize, from: Rank) -> Result<(), EngineError> {
    match layer < layers {
        true => Ok(()),
        false => Err(EngineError::Internal(format!("rank {from} sent something of layer {layer}"))),
    }
}

#[cfg(test)]
#[path = "hazard_tests.rs"]
mod hazard_tests;

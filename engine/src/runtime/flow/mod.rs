//! The loop of `--schedule flow`: no exchange is a barrier. A rank works on whatever tokens are ready, at whatever
//! layer; a token whose next expert is here waits for nobody, one that leaves is sent at once; keys and values go in the
//! background, sampled ids are one message to all, and so are rank 0's orders.
//!
//! The same rows move by the same route plan as in rounds, and kernels give a row the same bits whatever else is in a
//! batch; so tokens and logits are the same.

pub(crate) mod board;
mod depart;
mod notes;

pub(crate) use depart::latencies;

use super::coherence::Arrived;
use super::frames::{Choice, Reader, Writer};
use super::sequence::{Order, Sampled, Sequence};
use super::step::{Hopped, Stepper};
use super::worker::{Command, Directive, Event, STOP, Worker};
use crate::EngineError;
use board::{Board, Picked, Standing, Token, Unit};
use exflow_placement::{ExpertId, LayerId, Rank, Strategy};
use exflow_transport::{ByteClass, Message, TransportError};
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
/// How long the ranks wait for each other's goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// Tokens of a prompt that are prefilled together.
const CHUNK: u32 = 256;

/// What the loop holds beside the rank's own state.
pub(super) struct Flow {
    board: Board<Waiting>,
    notes: Notes,
    /// Keys and values for positions that no block was granted for yet.
    unplaced: Vec<(u16, Arrived)>,
    /// Rank 0: whether something happened that its policy should look at.
    changed: bool,
    /// When the loop last did or heard anything.
    lively: Instant,
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
            board: Board::new(me),
            notes: Notes::new(me),
            unplaced: Vec::new(),
            changed: false,
            lively: Instant::now(),
        };
        while !self.stopping {
            self.receive(&mut flow, Duration::ZERO)?;
            self.order(&mut flow)?;
            self.send_news()?;
            let began = Instant::now();
            match self.pick(&mut flow) {
                Some(picked) => {
                    self.hop(&mut flow, picked)?;
                    self.stats.busy_seconds += began.elapsed().as_secs_f64();
                    flow.lively = Instant::now();
                }
                None => {
                    self.rest(&mut flow)?;
                    self.stats.idle_seconds += began.elapsed().as_secs_f64();
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
        self.receive(flow, wait)
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
                let frame =
                    Reader::new(&payload, from).kv(4 * spec.attention.cache4(), self.decoder.cache_form)?;
                check_layer(usize::from(frame.layer), spec.layers, from)?;
                for (sequence, position, values) in frame.rows {
                    let arrived = Arrived { sequence, position, values };
                    if let Some(Waiting::Kv(layer, arrived)) =
                        flow.board.other(sequence, Waiting::Kv(frame.layer, arrived))
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
    fn holds(&self, sequence: u32, home: Rank, prompt: u32) -> bool {
        let me = self.comm.rank();
        (0..self.decoder.spec.layers)
            .filter(|&layer| self.domain(layer, home).contains(&me))
            .all(|layer| self.coherence.is_complete(layer as u16, sequence, prompt))
    }

    fn domain(&self, layer: usize, home: Rank) -> Vec<Rank> {
        self.options.table.domain(self.decoder.spec.moe_before(layer).map(LayerId::from), home)
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
                flow.notes.sampled(from, sampled.clone(), index);
                self.count_in_order(flow, sequence);
            }
            Note::Holds(sequence) => flow.notes.holds(sequence, from),
            Note::News(news) => news.into_iter().for_each(|news| self.tell(news.event(from))),
            Note::Goodbye => {}
        }
        Ok(())
    }

    /// What the driver is to know goes to rank 0, from a rank of another process.
    fn send_news(&mut self) -> Result<(), EngineError> {
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
            let Some((from, sampled)) = flow.notes.next(sequence, running.output.len() as u32) else {
                return;
            };
            self.count(sampled, from);
            flow.changed = true;
        }
    }

    /// Carries out what rank 0 ordered, and what follows from it for tokens under way.
    fn obey(&mut self, flow: &mut Flow, from: Rank, directive: Directive) -> Result<(), EngineError> {
        let order = match &directive {
            Directive::Order(order) => Some(order.clone()),
            _ => None,
        };
        self.carry_out(from, directive)?;
        match order {
            Some(Order::Admit(start)) => {
                let (id, home) = (start.id, start.home);
                let layers = 0..self.decoder.spec.layers;
                let mut ranks: Vec<Rank> = layers.flat_map(|layer| self.domain(layer, home)).collect();
                ranks.sort_unstable();
                ranks.dedup();
                flow.notes.admit(id, home, &ranks);
                for waiting in flow.board.admit(id) {
                    match waiting {
                        Waiting::Kv(layer, arrived) => self.place(flow, layer, arrived)?,
                        Waiting::Note(from, note) => self.take_note(flow, from, note)?,
                    }
                }
            }
            Some(Order::Grant { .. }) => {
                for (layer, arrived) in std::mem::take(&mut flow.unplaced) {
                    self.place(flow, layer, arrived)?;
                }
            }
            Some(Order::Prefill { sequence, .. }) => self.prefill(flow, sequence),
            Some(Order::End(id) | Order::Preempt(id)) => {
                flow.board.end(id);
                flow.notes.end(id);
                flow.unplaced.retain(|(_, arrived)| arrived.sequence != id);
            }
            None => {}
        }
        Ok(())
    }

    /// Home: the next chunk of a prompt begins, unless one is under way.
    fn prefill(&mut self, flow: &mut Flow, id: u32) {
        let Some(sequence) = self.sequences.running.get(&id) else { return };
        let mut chunk = sequence.chunk();
        chunk.end = chunk.end.min(chunk.start + CHUNK);
        if sequence.start.home != self.comm.rank() || chunk.is_empty() || flow.board.prefills(id) {
            return;
        }
        let token = |position: u32| Token::new(id, position, sequence.start.prompt[position as usize]);
        flow.board.start(true, chunk.map(token).collect());
    }

    /// Rank 0: what the driver asks, and what the policy makes of what happened, as orders to all.
    fn order(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        while let Some(commands) = &self.commands {
            match commands.try_recv() {
                Ok(command) => self.take_command(flow, command)?,
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    return self.take_command(flow, STOP);
                }
            }
        }
        if self.commands.is_none() || !std::mem::take(&mut flow.changed) {
            return Ok(());
        }
        let orders = self.scheduler.plan(&self.sequences);
        self.give(flow, orders.into_iter().map(Directive::Order).collect())?;
        // A long prompt is ordered in parts, and nothing else need happen in between.
        let part = |s: &Sequence| (s.ordered as usize) < s.start.prompt.len();
        flow.changed |= self.sequences.running.values().any(part);
        Ok(())
    }

    fn take_command(&mut self, flow: &mut Flow, command: Command) -> Result<(), EngineError> {
        flow.changed = true;
        match command {
            Command::Submit(admission) => self.scheduler.submit(admission),
            Command::Cancel(request) => self.scheduler.cancel(request),
            Command::Report => self.give(flow, vec![Directive::Report])?,
            Command::Measure => {
                return Err(EngineError::Internal("ranks are measured in rounds".into()));
            }
            Command::Stop { again } => self.give(flow, vec![Directive::Stop { again }])?,
        }
        Ok(())
    }

    /// Rank 0: gives orders to all, itself included.
    fn give(&mut self, flow: &mut Flow, directives: Vec<Directive>) -> Result<(), EngineError> {
        if directives.is_empty() {
            return Ok(());
        }
        self.note_to_all(&Note::Orders(directives.clone()))?;
        directives.into_iter().try_for_each(|directive| self.obey(flow, Rank(0), directive))
    }

    fn note_to(&mut self, to: Rank, note: &Note) -> Result<(), EngineError> {
        let bytes = postcard::to_stdvec(note).map_err(|e| EngineError::Internal(e.to_string()))?;
        Ok(self.comm.send_message(to, ByteClass::Ids, u16::MAX, bytes.into())?)
    }

    fn note_to_all(&mut self, note: &Note) -> Result<(), EngineError> {
        let me = self.comm.rank();
        (0..self.comm.world_size())
            .map(Rank::from)
            .filter(|to| *to != me && !self.comm.absent().contains(to))
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|to| self.note_to(to, note))
    }

    /// What can be done now.
    fn pick(&self, flow: &mut Flow) -> Option<Picked> {
        let layers = self.decoder.spec.layers;
        let (sequences, coherence) = (&self.sequences, &self.coherence);
        flow.board.pick(|unit: &Unit| {
            let (first, last) = (&unit.tokens[0], &unit.tokens[unit.tokens.len() - 1]);
            let Some(sequence) = sequences.running.get(&first.sequence) else { return false };
            if unit.stage == layers {
                // Limits and penalties go by what was sampled before, of which all must have been heard.
                return unit.prefill || sequence.tokens() > last.position as usize;
            }
            let (layer, position) = (unit.stage as u16, first.position);
            sequence.slot(last.position).is_some() && coherence.is_complete(layer, first.sequence, position)
        })
    }

    fn stepper(&mut self) -> Stepper<'_> {
        Stepper {
            decoder: &mut self.decoder,
            comm: self.comm.as_mut(),
            table: &self.options.table,
            strategy: self.options.strategy,
            combine: self.options.combine,
            sequences: &self.sequences,
            coherence: &mut self.coherence,
            stats: &mut self.stats,
            round: &mut self.round,
        }
    }

    /// Puts what was picked through the device, and sends on what comes out.
    fn hop(&mut self, flow: &mut Flow, picked: Picked) -> Result<(), EngineError> {
        let before = self.comm.stats();
        let decode = !picked.prefill;
        if picked.stage == 0 && decode {
            self.stats.decode_tokens += picked.units.len() as u64;
        }
        self.stats.hops += 1;
        self.stats.hop_rows += picked.rows() as u64;
        let hopped = self.stepper().hop(&picked)?;
        self.send_partials(flow, &picked, &hopped)?;
        let ended = picked.stage == self.decoder.spec.layers;
        let (stage, prefill) = (picked.stage, picked.prefill);
        if ended {
            let units = picked.units;
            let Hopped { outcome, .. } = hopped;
            outcome.captured.into_iter().for_each(|captured| self.tell(Event::Captured(captured)));
            self.send_news()?; // before the ids that end a sequence
            self.finish(flow, units, outcome.sampled)?;
        } else {
            self.send_on(flow, stage, prefill, picked.units, hopped)?;
        }
        let wire = self.comm.stats().since(&before);
        self.stats.add_step(decode, &wire);
        self.stats.dropped += std::mem::take(&mut flow.board.dropped);
        Ok(())
    }

    /// Partials of what was served go to where their tokens are.
    fn send_partials(
        &mut self,
        flow: &mut Flow,
        picked: &Picked,
        hopped: &Hopped,
    ) -> Result<(), EngineError> {
        let Some(layer) = picked.stage.checked_sub(1).filter(|_| !picked.serves.is_empty()) else {
            return Ok(());
        };
        let me = self.comm.rank();
        let shape = (4 * self.decoder.spec.h4(), self.decoder.spec.hidden);
        let combine = self.options.combine;
        let mut payloads: Vec<Option<Writer>> = (0..self.comm.world_size()).map(|_| None).collect();
        for (to, frame) in depart::partials(me, &picked.serves, &hopped.served, shape, combine) {
            if to == me {
                flow.board.partial(layer as u16, frame);
                continue;
            }
            let payload = payloads[to.index()].get_or_insert_with(|| begin(picked.prefill));
            payload.partial(frame.sequence, frame.position, frame.k, &frame.values);
            self.stats.crossings += u64::from(!picked.prefill);
        }
        self.send(payloads, ByteClass::Combine, layer as u16)
    }

    fn send(
        &mut self,
        payloads: Vec<Option<Writer>>,
        class: ByteClass,
        layer: u16,
    ) -> Result<(), EngineError> {
        for (to, payload) in payloads.into_iter().enumerate() {
            if let Some(payload) = payload {
                self.comm.send_message(Rank::from(to), class, layer, payload.finish())?;
            }
        }
        Ok(())
    }

    /// Tokens that have passed a layer's attention go where its experts are.
    fn send_on(
        &mut self,
        flow: &mut Flow,
        layer: usize,
        prefill: bool,
        units: Vec<Unit>,
        hopped: Hopped,
    ) -> Result<(), EngineError> {
        let Hopped { rows, routed, outcome, .. } = hopped;
        outcome.captured.into_iter().for_each(|captured| self.tell(Event::Captured(captured)));
        let (me, spec) = (self.comm.rank(), &self.decoder.spec);
        let (top_k, hidden, stride) = (spec.top_k, spec.hidden, 4 * spec.h4());
        let moe = spec.moe_index(layer);
        let mut payloads: Vec<Option<Writer>> = (0..self.comm.world_size()).map(|_| None).collect();
        let mut at = 0;
        for mut unit in units {
            let mut stays = true;
            for token in &mut unit.tokens {
                let residual = &routed.residual[at * stride..][..hidden];
                let Some(index) = moe else {
                    token.residual = residual.to_vec();
                    at += 1;
                    continue;
                };
                let range = at * top_k..(at + 1) * top_k;
                let (chosen, weights) = (&routed.chosen[range.clone()], &routed.weights[range]);
                let choices = chosen.iter().zip(weights).enumerate();
                let choice = |(k, (&expert, &weight))| Choice { k: k as u16, expert: expert as u16, weight };
                let choices: Vec<Choice> = choices.map(choice).collect();
                let experts: Vec<_> = chosen.iter().map(|&e| ExpertId::from(e as usize)).collect();
                let coherent = self.options.strategy == Strategy::Coherent
                    && !prefill
                    && flow.notes.is_coherent(token.sequence);
                let strategy = if coherent { Strategy::Coherent } else { Strategy::Vanilla };
                let route = self.options.table.route(strategy, LayerId::from(index), me, &experts, weights);
                if !prefill {
                    self.stats.latencies += depart::latencies(me, &route);
                    if let Some(main) = token.main {
                        self.stats.transitions += 1;
                        self.stats.stays += u64::from(main == route.serving[0]);
                    }
                }
                let combine = self.options.combine;
                let (leaving, stay) = depart::depart(me, token, &route, &choices, combine, residual);
                stays &= stay;
                for (to, row) in leaving {
                    payloads[to.index()].get_or_insert_with(|| begin(prefill)).row(&row);
                    self.stats.crossings += u64::from(!prefill);
                }
                at += 1;
            }
            if stays {
                flow.board.go_on(unit);
            }
        }
        self.send(payloads, ByteClass::Dispatch, layer as u16)?;
        self.stepper().spread_contexts(layer, &rows, &routed)
    }

    /// What was sampled is told to all, and each token's successor begins here.
    fn finish(
        &mut self,
        flow: &mut Flow,
        units: Vec<Unit>,
        sampled: Vec<Sampled>,
    ) -> Result<(), EngineError> {
        let me = self.comm.rank();
        for sampled in sampled {
            let id = sampled.sequence;
            let Some(running) = self.sequences.running.get(&id) else { continue };
            let note = Note::Sampled(sampled.clone(), running.output.len() as u32);
            self.note_to_all(&note)?;
            self.count(sampled, me);
            flow.changed = true;
            let next = self.sequences.running.get(&id).and_then(|s| s.next_token());
            if let Some((token, position)) = next {
                flow.board.start(false, vec![Token::new(id, position, token)]);
            }
        }
        for unit in units.iter().filter(|unit| unit.prefill) {
            let (id, end) = (unit.tokens[0].sequence, unit.tokens[unit.tokens.len() - 1].position + 1);
            if let Some(sequence) = self.sequences.running.get_mut(&id) {
                sequence.prefilled = end;
            }
            self.prefill(flow, id);
        }
        Ok(())
    }

    /// Everybody waits for everybody's goodbye, so that nobody takes a peer that left for one that failed.
    fn part(&mut self) -> Result<(), EngineError> {
        self.note_to_all(&Note::Goodbye)?;
        let mut missing = self.comm.world_size() - 1 - self.comm.absent().len();
        let deadline = Instant::now() + GOODBYE;
        while missing > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.comm.recv_message(left) {
                Ok(Some(message)) if message.class == ByteClass::Ids => {
                    let note = postcard::from_bytes::<Note>(&message.payload);
                    missing -= usize::from(matches!(note, Ok(Note::Goodbye)));
                }
                Ok(Some(_)) => {}
                // Who is gone will say nothing more; what had to be done is done.
                Ok(None) | Err(TransportError::PeerLost { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The beginning of a payload of rows or partials.
fn begin(prefill: bool) -> Writer {
    let mut writer = Writer::default();
    writer.u16(u16::from(prefill));
    writer
}

fn check_layer(layer: usize, layers: usize, from: Rank) -> Result<(), EngineError> {
    match layer < layers {
        true => Ok(()),
        false => Err(EngineError::Internal(format!("rank {from} sent something of layer {layer}"))),
    }
}

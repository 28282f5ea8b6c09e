//! Flow: what rank 0 decides and how it is carried out, what ranks tell each other, and how they part.

use super::super::moving::MoveOrder;
use super::super::sequence::{Order, Sequence};
use super::super::worker::{Command, Directive, STOP, Worker};
use super::board::Token;
use super::notes::Note;
use super::{Flow, Waiting};
use crate::EngineError;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, TransportError};
use std::time::{Duration, Instant};

/// How long the ranks wait for each other's goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// Tokens of a prompt that are prefilled together.
const CHUNK: u32 = 256;

impl Worker {
    /// Carries out what rank 0 ordered, and what follows from it for tokens under way.
    pub(super) fn obey(
        &mut self,
        flow: &mut Flow,
        from: Rank,
        directive: Directive,
    ) -> Result<(), EngineError> {
        let order = match &directive {
            Directive::Order(order) => Some(order.clone()),
            _ => None,
        };
        let settles = matches!(&directive, Directive::Move(MoveOrder::Settle { .. } | MoveOrder::GiveUp));
        self.carry_out(from, directive)?;
        if settles {
            self.acknowledge(flow)?;
        }
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

    /// Domains are smaller now, so that a prompt may be everywhere where this rank needs it.
    fn acknowledge(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        for id in flow.notes.owing() {
            let start = self.sequences.running.get(&id).map(|sequence| &sequence.start);
            let Some((home, prompt)) = start.map(|start| (start.home, start.prompt.len() as u32)) else {
                continue;
            };
            if self.holds(id, home, prompt) {
                flow.notes.acknowledged(id);
                self.note_to(home, &Note::Holds(id))?;
            }
        }
        Ok(())
    }

    /// Home, or everywhere where prompts are: the next chunk of a prompt begins, unless one is under way.
    pub(super) fn prefill(&mut self, flow: &mut Flow, id: u32) {
        let Some(sequence) = self.sequences.running.get(&id) else { return };
        let mut chunk = sequence.chunk();
        chunk.end = chunk.end.min(chunk.start + CHUNK);
        let elsewhere = sequence.start.home != self.comm.rank() && !self.replicates();
        if elsewhere || chunk.is_empty() || flow.board.prefills(id) {
            return;
        }
        let start = &sequence.start;
        let token = |position: u32| Token::new(id, position, start.prompt[position as usize], start.edition);
        flow.board.start(true, chunk.map(token).collect());
    }

    /// Rank 0: what the driver asks, and what the policy makes of what happened, as orders to all.
    pub(super) fn order(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        while let Some(commands) = &self.commands {
            match commands.try_recv() {
                Ok(command) => self.take_command(flow, command)?,
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    return self.take_command(flow, STOP);
                }
            }
        }
        if self.commands.is_some()
            && let Some(order) = self.next_of_move()
        {
            self.give(flow, vec![Directive::Move(order)])?;
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

    pub(super) fn take_command(&mut self, flow: &mut Flow, command: Command) -> Result<(), EngineError> {
        flow.changed = true;
        match command {
            Command::Submit(admission) => self.scheduler.submit(admission),
            Command::Cancel(request) => self.scheduler.cancel(request),
            Command::Report => self.give(flow, vec![Directive::Report])?,
            Command::Measure => {
                return Err(EngineError::Internal("ranks are measured in rounds".into()));
            }
            Command::Move(table) => {
                let order = self.begin_move(*table).map(Directive::Move);
                self.give(flow, order.into_iter().collect())?;
            }
            Command::Stop { again } => self.give(flow, vec![Directive::Stop { again }])?,
        }
        Ok(())
    }

    /// Rank 0: gives orders to all, itself included.
    pub(super) fn give(&mut self, flow: &mut Flow, directives: Vec<Directive>) -> Result<(), EngineError> {
        if directives.is_empty() {
            return Ok(());
        }
        self.note_to_all(&Note::Orders(directives.clone()))?;
        directives.into_iter().try_for_each(|directive| self.obey(flow, Rank(0), directive))
    }

    pub(super) fn note_to(&mut self, to: Rank, note: &Note) -> Result<(), EngineError> {
        let bytes = postcard::to_stdvec(note).map_err(|e| EngineError::Internal(e.to_string()))?;
        Ok(self.comm.send_message(to, ByteClass::Ids, u16::MAX, bytes.into())?)
    }

    pub(super) fn note_to_all(&mut self, note: &Note) -> Result<(), EngineError> {
        let me = self.comm.rank();
        (0..self.comm.world_size())
            .map(Rank::from)
            .filter(|to| *to != me && !self.comm.absent().contains(to))
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|to| self.note_to(to, note))
    }

    /// Everybody waits for everybody's goodbye, so that nobody takes a peer that left for one that failed.
    pub(super) fn part(&mut self) -> Result<(), EngineError> {
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

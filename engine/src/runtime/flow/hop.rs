//! Flow: one hop of a rank, from what was picked to what is sent on.

use super::super::bounds;
use super::super::frames::Choice;
use super::super::sequence::Sampled;
use super::super::stats::Waited;
use super::super::step::Hopped;
use super::super::worker::{Event, Worker};
use super::board::{Picked, Token, Unit};
use super::depart::Departure;
use super::notes::Note;
use super::{BULK_BYTES, BULK_HOPS, Flow, depart};
use crate::EngineError;
use exflow_placement::{ExpertId, LayerId, Rank, Route, Strategy};
use exflow_transport::ByteClass;
use std::time::Instant;

impl Worker {
    /// Puts what was picked through the device, and sends on what comes out. The hop began at `began`.
    pub(super) fn hop(&mut self, flow: &mut Flow, picked: Picked, began: Instant) -> Result<(), EngineError> {
        let decode = !picked.prefill;
        if !decode {
            self.send_waiting_bulk(flow)?; // each hop's bytes are of one kind
        }
        let before = self.comm.stats();
        if picked.stage == 0 && decode {
            self.stats.decode_tokens += picked.units.len() as u64;
        }
        self.stats.hops += 1;
        let hop_rows = picked.rows();
        self.stats.hop_rows += hop_rows as u64;
        let (decoded, waited) = decoded(&picked);
        let hopped = self.stepper().hop(&picked)?;
        flow.tick();
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
        self.stats.waited.add(&waited);
        let seconds = began.elapsed().as_secs_f64();
        self.stats.waited.compute += decoded * seconds;
        if decode {
            flow.linger.hopped(hop_rows, seconds);
        }
        self.stats.dropped += std::mem::take(&mut flow.board.dropped);
        Ok(())
    }

    /// Sends the keys and values of decoded tokens that have waited.
    fn send_bulk(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        flow.bulk.1 = 0;
        if flow.bulk.0.is_empty() {
            return Ok(());
        }
        flow.bulk.0.send(self.comm.as_mut())
    }

    /// Between hops: the same, counted for itself.
    pub(super) fn send_waiting_bulk(&mut self, flow: &mut Flow) -> Result<(), EngineError> {
        if flow.bulk.0.is_empty() {
            return Ok(());
        }
        let before = self.comm.stats();
        self.send_bulk(flow)?;
        let wire = self.comm.stats().since(&before);
        self.stats.add_step(true, &wire);
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
        let others = self.others();
        for (to, frame) in depart::partials(me, &picked.serves, &hopped.served, shape, combine) {
            if to == me {
                if picked.prefill && self.replicates() {
                    for &other in &others {
                        let payload = self.payloads.to(other).begin(true);
                        payload.partial(frame.sequence, frame.position, frame.k, &frame.values);
                    }
                }
                flow.board.partial(layer as u16, frame);
                continue;
            }
            let payload = self.payloads.to(to).begin(picked.prefill);
            payload.partial(frame.sequence, frame.position, frame.k, &frame.values);
            self.stats.crossings += u64::from(!picked.prefill);
        }
        self.send(ByteClass::Combine, layer as u16)
    }

    /// The other ranks that are there.
    fn others(&self) -> Vec<Rank> {
        let (me, absent) = (self.comm.rank(), self.comm.absent());
        let all = (0..self.comm.world_size()).map(Rank::from);
        all.filter(|rank| *rank != me && !absent.contains(rank)).collect()
    }

    /// Sends what was written for each rank.
    fn send(&mut self, class: ByteClass, layer: u16) -> Result<(), EngineError> {
        for to in (0..self.comm.world_size()).map(Rank::from) {
            let payload = self.payloads.take(to);
            if !payload.is_empty() {
                self.comm.send_message(to, class, layer, payload)?;
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
                let home = self.sequences.running.get(&token.sequence).map_or(me, |s| s.start.home);
                let (table, moe_layer) = (self.tables.of(token.edition)?, LayerId::from(index));
                let combine = self.options.combine;
                if prefill && self.replicates() {
                    // Every rank plans what the home would, and keeps its own copy of the token.
                    let route = table.route(strategy, moe_layer, home, &experts, weights);
                    let route = &Route { next: me, ..route };
                    Departure { me, route, choices: &choices, combine, residual }.stay(token);
                    at += 1;
                    continue;
                }
                let (groups, at_home) = (&self.options.groups, (home, me));
                let route = bounds::route(groups, table, (strategy, moe_layer), at_home, &experts, weights);
                if !prefill {
                    self.stats.latencies += depart::latencies(me, &route);
                    if let Some(main) = token.main {
                        self.stats.transitions += 1;
                        self.stats.stays += u64::from(main == route.serving[0]);
                    }
                }
                let of = Departure { me, route: &route, choices: &choices, combine, residual };
                let (leaving, stay) = of.depart(token);
                stays &= stay;
                for (to, row) in leaving {
                    if to == me {
                        flow.board.row(layer as u16, prefill, row.owned());
                        continue;
                    }
                    self.payloads.to(to).begin(prefill).row(&row);
                    self.stats.crossings += u64::from(!prefill);
                }
                at += 1;
            }
            if stays {
                flow.board.go_on(unit);
            }
        }
        self.send(ByteClass::Dispatch, layer as u16)?;
        let (bulk, waited) = &mut flow.bulk;
        self.stepper().gather_contexts(layer, &rows, &routed, bulk)?;
        *waited += 1;
        if prefill || *waited >= BULK_HOPS || bulk.bytes() >= BULK_BYTES {
            self.send_bulk(flow)?;
        }
        Ok(())
    }

    /// What was sampled is told to all, and each token's successor begins here.
    fn finish(
        &mut self,
        flow: &mut Flow,
        units: Vec<Unit>,
        sampled: Vec<Sampled>,
    ) -> Result<(), EngineError> {
        for sampled in sampled {
            let (id, went_by) = (sampled.sequence, sampled.edition);
            let Some(running) = self.sequences.running.get(&id) else { continue };
            let note = Note::Sampled(sampled.clone(), running.output.len() as u32);
            self.note_to_all(&note)?;
            self.count(sampled);
            flow.heard(&self.sequences);
            let next = self.sequences.running.get(&id).and_then(|s| Some((s.next_token()?, s.edition)));
            if let Some(((token, position), edition)) = next {
                // Who sampled its predecessor may not have rank 0's word yet.
                let edition = edition.later(went_by);
                flow.board.start(false, vec![Token::new(id, position, token, edition)]);
            }
        }
        for unit in units.iter().filter(|unit| unit.prefill) {
            let (id, end) = (unit.tokens[0].sequence, unit.tokens[unit.tokens.len() - 1].position + 1);
            let Some(sequence) = self.sequences.running.get_mut(&id) else { continue };
            sequence.prefilled = end;
            let (home, whole) = (sequence.start.home, end as usize == sequence.start.prompt.len());
            if whole && self.replicates() && flow.notes.owes(id) {
                flow.notes.acknowledged(id);
                self.note_to(home, &Note::Holds(id))?;
            }
            self.prefill(flow, id);
        }
        Ok(())
    }
}

/// Decoded tokens of a hop, and what they waited for on this rank before it.
fn decoded(picked: &Picked) -> (f64, Waited) {
    let mut waited = Waited::default();
    let units = picked.units.iter().filter(|unit| !unit.prefill);
    let count = units.clone().count() as f64;
    for spent in units.map(Unit::spent) {
        waited.combine += spent.partials.as_secs_f64();
        waited.context += spent.context.as_secs_f64();
        waited.ids += spent.ids.as_secs_f64();
        waited.queue += spent.queue.as_secs_f64();
        waited.linger += spent.linger.as_secs_f64();
    }
    (count, waited)
}

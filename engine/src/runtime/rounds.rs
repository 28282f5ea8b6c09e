//! The loop in rounds: agree on what runs, step, tell what was sampled, again. Every exchange is one that all ranks
//! take part in.
//!
//! What ranks tell each other after a step is heard during the next one: it began before the next step's first exchange
//! and so is there when that is over, and no latency of its own is waited for. A rank knows what it sampled itself, which
//! is all that its rows of the next step are made from. Orders are carried out between two steps, one step later than
//! they are given, unless there is nothing to step for: by all ranks at the same place.

use super::moving::MoveNews;
use super::outlet::News;
use super::sequence::Sampled;
use super::stats::Waited;
use super::step::{BULK_LAYERS, Batch, Outcome, Part, Passage, Row, Stepper, Submitted};
use super::worker::{Directive, Event, Worker};
use crate::EngineError;
use crate::model::scratch::Scratch;
use crate::options::{Overlap, Prefill};
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, RoundId, TransportError, WireStats};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What every rank tells every other one at the end of a step.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Gathered {
    sampled: Vec<Sampled>,
    directives: Vec<Directive>,
    /// To rank 0 alone, from ranks of other processes: what the driver is to know.
    news: Vec<News>,
    /// Whether there is more of it than one gathering takes.
    more: bool,
    /// To rank 0 alone: what was done of a move of experts.
    moved: Vec<MoveNews>,
}

/// What the loop holds beside the rank's own state.
#[derive(Default)]
struct Rounds {
    /// Sequences whose last token was sampled here, with that token and its position.
    residents: BTreeMap<u32, (u32, u32)>,
    /// What was told and has still to be heard.
    unheard: Option<RoundId>,
    /// Rank 0: whether it has ordered steps in halves.
    halves: bool,
    /// Orders that were heard and have still to be carried out.
    held: Vec<(Rank, Directive)>,
    /// One rank: decode steps that were submitted before it was their turn.
    ahead: Submitted,
}

/// One rank submits decode steps ahead where one takes less: what is between two steps, some 0.2 ms, is nothing beside longer ones, and
/// a request that comes in between waits for all that are submitted.
const AHEAD_SECONDS: f64 = 0.02;

/// So many of them as one submission, where they take less together: what a submission costs, some 50 us between threads, is shared by
/// their steps.
const TOGETHER_SECONDS: f64 = 0.003;
const MOST_TOGETHER: usize = 4;

/// How long the first gathering waits for ranks that still load; one that dies is noticed at once.
const LOADING: Duration = Duration::from_secs(3600);

impl Worker {
    pub(super) fn run_rounds(&mut self) -> Result<(), EngineError> {
        self.meet()?;
        let mut rounds = Rounds::default();
        while !self.stopping {
            self.move_on()?;
            // One rank hears itself at once; several need a step to hear each other in.
            let steps = self.sequences.chunks().next().is_some() || self.sequences.decodable() > 0;
            if !steps || self.comm.world_size() == 1 {
                self.hear(&mut rounds)?;
                self.carry_out_held(&mut rounds)?;
                if self.stopping {
                    break;
                }
            }
            let outcome = self.step(&mut rounds)?;
            self.carry_out_held(&mut rounds)?;
            if self.stopping {
                break;
            }
            let mut directives = self.decide();
            directives.extend(self.decide_halves(&mut rounds));
            for captured in outcome.captured {
                self.tell(Event::Captured(captured));
            }
            rounds.unheard =
                Some(self.say(Gathered { sampled: outcome.sampled, directives, ..Gathered::default() })?);
        }
        Ok(())
    }

    /// Chunks of prompts where rank 0 ordered such, else one token of every sequence, else nothing.
    fn step(&mut self, rounds: &mut Rounds) -> Result<Outcome, EngineError> {
        let batch = match self.sequences.chunks().next() {
            Some(_) => self.prompt_batch(),
            None => self.decode_batch(rounds),
        };
        if batch.total == 0 {
            return Ok(Outcome::default());
        }
        let (started, before) = (Instant::now(), self.comm.stats());
        let Some(outcome) = self.run_batch(rounds, &batch)? else { return Ok(Outcome::default()) };
        let wire = self.comm.stats().since(&before);
        self.stats.add_step(batch.decode, &wire);
        match batch.decode {
            true => {
                self.stats.decode_steps += 1;
                self.stats.decode_parts += 1 + u64::from(self.splits(&batch));
                self.stats.decode_tokens += batch.tokens.len() as u64;
                let seconds = started.elapsed().as_secs_f64();
                self.stats.decode_seconds += seconds;
                let waited = self.add_waits(seconds, &wire);
                self.halving.stepped(batch.total, self.splits(&batch), seconds, waited);
            }
            false => self.stats.prefill_steps += 1,
        }
        self.sequences.stepped(batch.decode);
        // One rank: those that joined behind a step that was submitted ahead had no part in it.
        rounds.residents.keys().filter(|_| batch.decode).for_each(|&id| self.sequences.sat_out(id));
        for sampled in &outcome.sampled {
            if let Some(next) = self.sequences.successor(sampled.sequence, sampled.token) {
                rounds.residents.insert(sampled.sequence, next);
            }
        }
        Ok(outcome)
    }

    /// Splits a decode step's time by what it went into; the wait for contexts was noted on the way. Returns the wait for
    /// rows and partials.
    fn add_waits(&mut self, seconds: f64, wire: &WireStats) -> f64 {
        let wait = |class| wire.wait(class).as_secs_f64();
        let (dispatch, combine) = (wait(ByteClass::Dispatch), wait(ByteClass::Combine));
        let (ids, context) = (wait(ByteClass::Ids), std::mem::take(&mut self.stats.context_seconds));
        let compute = (seconds - dispatch - combine - ids - context).max(0.0);
        self.stats.waited.add(&Waited { compute, dispatch, combine, context, ids, ..Waited::default() });
        dispatch + combine
    }

    /// One step over all layers, in which what was told after the last one is heard; none where that is that there is
    /// nothing to step for.
    fn run_batch(&mut self, rounds: &mut Rounds, batch: &Batch) -> Result<Option<Outcome>, EngineError> {
        let (rank, rows) = (self.comm.rank().index(), batch.tokens.len());
        let _span = tracing::debug_span!("step", rank, rows, decode = batch.decode).entered();
        if self.comm.world_size() == 1 {
            return self.run_alone(rounds, batch).map(Some);
        }
        let batches = self.parts_of(batch);
        let mut parts = Vec::new();
        for (at, batch) in batches.iter().enumerate() {
            parts.push(Part::new(self.turn(at, |stepper| stepper.begin(batch))?));
        }
        let mut bulk = std::mem::take(&mut self.bulk);
        bulk.clear(); // of a step that was given up
        let alone = parts.len() == 1;
        let mut passage = Passage { decode: batch.decode, alone, captured: Vec::new(), bulk };
        let layers = self.decoder.spec.layers;
        while parts.iter().any(|part| part.layer < layers) {
            for at in 0..parts.len() {
                let part = &mut parts[at];
                let before = part.layer;
                self.turn(at, |stepper| stepper.go_on(part, &mut passage))?;
                if part.exchanged {
                    self.hear(rounds)?;
                    if self.sequences.is_over(batch.decode) {
                        for open in parts.iter_mut().filter_map(Part::give_up) {
                            self.comm.finish_exchange(open)?;
                        }
                        self.bulk = passage.bulk;
                        return Ok(None);
                    }
                }
                let part = &mut parts[at];
                self.turn(at, |stepper| stepper.enter(part, &mut passage))?;
                // Keys and values of decoded tokens are needed a step later: those of several layers travel together.
                let passed = (before + 1..=parts[at].layer)
                    .any(|layer| !batch.decode || layer % BULK_LAYERS == 0 || layer == layers);
                if passed && at + 1 == parts.len() {
                    passage.bulk.send(self.comm.as_mut())?;
                }
            }
        }
        self.bulk = passage.bulk;
        // What is sampled now depends on what was sampled before.
        self.hear(rounds)?;
        let mut outcome = Outcome::default();
        for (at, part) in parts.iter().enumerate() {
            let Outcome { mut sampled, mut captured } =
                self.turn(at, |stepper| stepper.sample(&part.rows))?;
            outcome.sampled.append(&mut sampled);
            outcome.captured.append(&mut captured);
        }
        outcome.captured.append(&mut passage.captured);
        Ok(Some(outcome))
    }

    /// The step of one rank. What follows on it is submitted before it has ended, so that the device need not wait for what is done
    /// between two steps: as one submission with what follows on that, where steps are short.
    fn run_alone(&mut self, rounds: &mut Rounds, batch: &Batch) -> Result<Outcome, EngineError> {
        let wanted: Vec<Row> = batch.tokens.iter().map(|(row, _)| *row).collect();
        if wanted.is_empty() {
            return Ok(Outcome::default());
        }
        if !batch.decode {
            rounds.ahead.overtake();
            let mut chunk = Submitted::default();
            self.stepper().submit_alone(batch, &mut chunk)?;
            return self.stepper().finish_alone(&mut chunk, &wanted);
        }
        let (ahead, together) = (&mut rounds.ahead, self.options.steps_together);
        if ahead.next().is_none() {
            self.stepper().submit_alone(batch, ahead)?;
        }
        // The first step is followed by one: nobody knows what it takes.
        let seconds = ahead.step_seconds().unwrap_or(TOGETHER_SECONDS);
        let by_time = ((TOGETHER_SECONDS / seconds) as usize).clamp(1, MOST_TOGETHER);
        let together = together.unwrap_or(if seconds < AHEAD_SECONDS { by_time } else { 0 });
        if ahead.may_go_on() && together > 0 {
            self.stepper().submit_next(ahead, together)?;
        }
        self.stepper().finish_alone(ahead, &wanted)
    }

    /// Whether a step runs in two halves: alike on every rank.
    fn splits(&self, batch: &Batch) -> bool {
        batch.decode && self.in_halves && batch.total > 1 && self.comm.world_size() > 1
    }

    /// A step's tokens, in two halves where that was ordered.
    fn parts_of(&self, batch: &Batch) -> Vec<Batch> {
        if !self.splits(batch) {
            return vec![batch.clone()];
        }
        let second = self.sequences.second_half();
        let half = |of_second: bool, total: usize| {
            let is_in = |(row, _): &&(Row, u32)| second.contains(&row.sequence) == of_second;
            Batch { decode: true, tokens: batch.tokens.iter().filter(is_in).copied().collect(), total }
        };
        vec![half(false, batch.total - second.len()), half(true, second.len())]
    }

    /// Lets a part of a step work: the second half has buffers of its own.
    fn turn<T>(
        &mut self,
        at: usize,
        work: impl FnOnce(&mut Stepper<'_>) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        if at == 0 {
            return work(&mut self.stepper());
        }
        let mut second = match self.second.take() {
            Some(second) => second,
            None => Scratch::new(&self.decoder.gpu, &self.decoder.spec)?,
        };
        std::mem::swap(&mut self.decoder.scratch, &mut second);
        let worked = work(&mut self.stepper());
        std::mem::swap(&mut self.decoder.scratch, &mut second);
        self.second = Some(second);
        worked
    }

    /// Rank 0: the order to run steps in halves, or whole again, where it is to change.
    fn decide_halves(&self, rounds: &mut Rounds) -> Option<Directive> {
        let is_mine = self.comm.rank() == Rank(0) && self.options.overlap == Overlap::Auto;
        let wish = is_mine && self.halving.wish();
        (is_mine && std::mem::replace(&mut rounds.halves, wish) != wish).then_some(Directive::Halves(wish))
    }

    fn prompt_batch(&self) -> Batch {
        let me = self.comm.rank();
        let mut batch = Batch { decode: false, tokens: Vec::new(), total: 0 };
        for sequence in self.sequences.chunks() {
            let chunk = sequence.chunk();
            batch.total += chunk.len();
            if sequence.start.home == me || self.options.prefill == Prefill::Replicated {
                let start = &sequence.start;
                let row = |at: u32| (Row::new(start.id, at, start.edition), start.prompt[at as usize]);
                batch.tokens.extend(chunk.map(row));
            }
        }
        batch
    }

    fn decode_batch(&self, rounds: &mut Rounds) -> Batch {
        let edition =
            |id, position| self.sequences.running.get(&id).map(|sequence| sequence.edition_at(position));
        let row = |(id, (token, position)): (u32, (u32, u32))| {
            let edition = edition(id, position).unwrap_or(self.tables.edition());
            (Row::new(id, position, edition), token)
        };
        let mut tokens: Vec<(Row, u32)> =
            std::mem::take(&mut rounds.residents).into_iter().map(row).collect();
        // Of those that a step was submitted for, that is the next one; the others wait for the one behind it.
        if let Some(ahead) = rounds.ahead.next() {
            let (now, later): (Vec<_>, Vec<_>) =
                tokens.iter().copied().partition(|(row, _)| ahead.contains(row));
            if now.is_empty() {
                rounds.ahead.clear();
            } else {
                tokens = now;
                let resident = |(row, token): (Row, u32)| (row.sequence, (token, row.position));
                rounds.residents = later.into_iter().map(resident).collect();
            }
        }
        Batch { decode: true, tokens, total: self.sequences.decodable() }
    }

    /// Waits until all have their weights, and are of one mind about what products are made of.
    pub(super) fn meet(&mut self) -> Result<(), EngineError> {
        let mut rounds = Rounds { unheard: Some(self.say(Gathered::default())?), ..Rounds::default() };
        self.hear(&mut rounds)?;
        self.agree()?;
        let adapter = self.decoder.gpu.name().to_owned();
        self.tell(Event::Ready(self.comm.rank(), adapter));
        self.behind = true;
        Ok(())
    }

    /// Tells all others what was sampled here and what rank 0 orders.
    fn say(&mut self, mine: Gathered) -> Result<RoundId, EngineError> {
        let (news, more) = self.outlet.take();
        let mut mine = Gathered { more, ..mine };
        let mut send = vec![encode(&mine)?; self.comm.world_size()];
        (mine.news, mine.moved) = (news, std::mem::take(&mut self.moving.news));
        if !mine.news.is_empty() || !mine.moved.is_empty() {
            send[0] = encode(&mine)?;
        }
        let round = RoundId { number: self.round, class: ByteClass::Ids, layer: u16::MAX };
        self.round += 1;
        self.comm.start_exchange(round, send)?;
        Ok(round)
    }

    /// Takes note of what all have sampled, in the same order on every rank, and keeps what was ordered.
    fn hear(&mut self, rounds: &mut Rounds) -> Result<(), EngineError> {
        let Some(round) = rounds.unheard.take() else { return Ok(()) };
        let all = self.finish_ids(round)?;
        self.behind = false;
        for (from, bytes) in all.iter().enumerate() {
            let from = Rank::from(from);
            if self.comm.absent().contains(&from) {
                continue;
            }
            let gathered: Gathered = postcard::from_bytes(bytes)
                .map_err(|e| EngineError::Internal(format!("rank {from} sent what cannot be read: {e}")))?;
            self.behind |= gathered.more;
            gathered.news.into_iter().for_each(|news| self.tell(news.event(from)));
            gathered.moved.into_iter().for_each(|news| self.director.hear(from, news));
            gathered.sampled.into_iter().for_each(|sampled| self.count(sampled));
            rounds.held.extend(gathered.directives.into_iter().map(|directive| (from, directive)));
        }
        Ok(())
    }

    fn carry_out_held(&mut self, rounds: &mut Rounds) -> Result<(), EngineError> {
        for (from, directive) in std::mem::take(&mut rounds.held) {
            self.carry_out(from, directive)?;
        }
        rounds.residents.retain(|id, _| self.sequences.running.contains_key(id));
        Ok(())
    }

    fn finish_ids(&mut self, round: RoundId) -> Result<Vec<Bytes>, EngineError> {
        let began = Instant::now();
        loop {
            match self.comm.finish_exchange(round) {
                Err(TransportError::RoundTimeout { .. })
                    if round.number == 0 && began.elapsed() < LOADING =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                done => return Ok(done?),
            }
        }
    }
}

fn encode(gathered: &Gathered) -> Result<Bytes, EngineError> {
    postcard::to_stdvec(gathered).map(Bytes::from).map_err(|e| EngineError::Internal(e.to_string()))
}

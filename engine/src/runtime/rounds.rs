//! The loop in rounds: agree on what runs, step, gather what was sampled, again. Every exchange is one that all
//! ranks take part in.

use super::outlet::News;
use super::sequence::Sampled;
use super::step::{Batch, Outcome, Row};
use super::worker::{Directive, Event, Worker};
use crate::EngineError;
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, RoundId, TransportError};
use serde::{Deserialize, Serialize};
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
}

/// How long the first gathering waits for ranks that still load; one that dies is noticed at once.
const LOADING: Duration = Duration::from_secs(3600);

impl Worker {
    pub(super) fn run_rounds(&mut self) -> Result<(), EngineError> {
        self.meet()?;
        while !self.stopping {
            let outcome = self.step()?;
            let directives = self.decide();
            for captured in outcome.captured {
                self.tell(Event::Captured(captured));
            }
            self.gather(Gathered { sampled: outcome.sampled, directives, ..Gathered::default() })?;
        }
        Ok(())
    }

    /// Chunks of prompts where rank 0 ordered such, else one token of every sequence, else nothing.
    fn step(&mut self) -> Result<Outcome, EngineError> {
        let me = self.comm.rank();
        let batch = match self.sequences.chunks().next() {
            Some(_) => self.prompt_batch(me),
            None => self.decode_batch(me),
        };
        if batch.total == 0 {
            return Ok(Outcome::default());
        }
        let (started, before) = (Instant::now(), self.comm.stats());
        let outcome = match batch.tokens.is_empty() && self.options.table.ranks == 1 {
            true => Outcome::default(),
            false => self.stepper().run(&batch)?,
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
        self.sequences.chunks_done();
        Ok(outcome)
    }

    fn prompt_batch(&self, me: Rank) -> Batch {
        let mut batch = Batch { decode: false, tokens: Vec::new(), total: 0 };
        for sequence in self.sequences.chunks() {
            let chunk = sequence.chunk();
            batch.total += chunk.len();
            if sequence.start.home == me {
                let row = |at: u32| (Row::new(sequence.start.id, at), sequence.start.prompt[at as usize]);
                batch.tokens.extend(chunk.map(row));
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

    /// Waits until all have their weights.
    pub(super) fn meet(&mut self) -> Result<(), EngineError> {
        self.gather(Gathered::default())?;
        let adapter = self.decoder.gpu.name().to_owned();
        self.tell(Event::Ready(self.comm.rank(), adapter));
        Ok(())
    }

    /// Everybody's sampled ids, then rank 0's directives, carried out by everybody in the same order.
    fn gather(&mut self, mine: Gathered) -> Result<(), EngineError> {
        let (news, more) = self.outlet.take();
        let mut mine = Gathered { more, ..mine };
        let mut send = vec![encode(&mine)?; self.comm.world_size()];
        if !news.is_empty() {
            mine.news = news;
            send[0] = encode(&mine)?;
        }
        let all = self.exchange_ids(send)?;
        self.behind = false;
        let mut directives = Vec::new();
        for (from, bytes) in all.iter().enumerate() {
            let from = Rank::from(from);
            if self.comm.absent().contains(&from) {
                continue;
            }
            let gathered: Gathered = postcard::from_bytes(bytes)
                .map_err(|e| EngineError::Internal(format!("rank {from} sent what cannot be read: {e}")))?;
            self.behind |= gathered.more;
            gathered.news.into_iter().for_each(|news| self.tell(news.event(from)));
            gathered.sampled.into_iter().for_each(|sampled| self.count(sampled, from));
            directives.extend(gathered.directives.into_iter().map(|directive| (from, directive)));
        }
        directives.into_iter().try_for_each(|(from, directive)| self.carry_out(from, directive))
    }

    fn exchange_ids(&mut self, send: Vec<Bytes>) -> Result<Vec<Bytes>, EngineError> {
        let round = RoundId { number: self.round, class: ByteClass::Ids, layer: u16::MAX };
        self.round += 1;
        self.comm.start_exchange(round, send)?;
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

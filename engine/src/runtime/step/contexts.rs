//! Contexts: where the keys and values of a step's rows are, and how they get to the rest of a layer's domain.

use super::super::coherence::{Arrived, blocks_for};
use super::super::frames::{KvRow, Payloads, Reader};
use super::super::sequence::{BLOCK, Standing};
use super::{Routed, Row, Stepper};
use crate::EngineError;
use crate::gpu::Recording;
use crate::model::scratch::KV_CHUNK;
use bytes::Bytes;
use exflow_placement::{LayerId, Rank};
use exflow_shaders::params::Query;
use exflow_transport::Communicator;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a token may wait for its context before the step fails.
const CONTEXT_TIMEOUT: Duration = Duration::from_secs(30);

impl Stepper<'_> {
    /// Waits until every row's context is complete at this layer.
    pub(super) fn await_contexts(&mut self, layer: usize, rows: &[Row]) -> Result<(), EngineError> {
        let began = Instant::now();
        let deadline = began + CONTEXT_TIMEOUT;
        let mut wait = Duration::ZERO;
        for (layer, arrived) in self.coherence.take_early() {
            self.place(layer, arrived);
        }
        loop {
            while let Some((from, bytes)) = self.comm.recv_bulk(wait)? {
                self.take_in(from, &bytes)?;
                wait = Duration::ZERO;
            }
            let missing =
                rows.iter().find(|r| !self.coherence.is_complete(layer as u16, r.sequence, r.position));
            let Some(row) = missing else {
                self.stats.context_seconds += began.elapsed().as_secs_f64();
                return Ok(());
            };
            if Instant::now() > deadline {
                return Err(EngineError::Internal(format!(
                    "layer {layer}: the context of sequence {} before position {} did not arrive",
                    row.sequence, row.position
                )));
            }
            wait = Duration::from_millis(50);
        }
    }

    /// Takes in keys and values that a peer made.
    pub(super) fn take_in(&mut self, from: Rank, bytes: &Bytes) -> Result<(), EngineError> {
        let (width, form) = self.decoder.kv_wire();
        let rows = Reader::new(bytes, from).kv(width, form)?;
        for KvRow { layer, sequence, position, values } in rows {
            if usize::from(layer) >= self.spec().layers {
                return Err(EngineError::Internal(format!("rank {from} sent keys of layer {layer}")));
            }
            if position as usize >= self.spec().max_positions {
                return Err(EngineError::Internal(format!("rank {from} sent keys of position {position}")));
            }
            if !self.place(layer, Arrived { sequence, position, values }) {
                let what =
                    format!("rank {from} sent more keys and values that nobody ordered than a cache holds");
                return Err(EngineError::Internal(what));
            }
        }
        Ok(())
    }

    /// A peer may be a step ahead, with orders carried out that this rank has still to carry out; what it made by them is
    /// kept until then: never more than the cache holds, as the peer has it in its own, which is as large. What is of
    /// sequences that ended is dropped. False: there is too much of it.
    fn place(&mut self, layer: u16, arrived: Arrived) -> bool {
        match self.sequences.standing(arrived.sequence, arrived.position) {
            Standing::Granted => {
                self.coherence.receive(layer, arrived);
                true
            }
            Standing::Early => {
                let most = self.sequences.blocks().1 as usize * BLOCK * self.spec().layers;
                self.coherence.keep(layer, arrived, most)
            }
            Standing::Ended => true,
        }
    }

    /// Writes slots, queries, turns and block table of the rows; returns the length of a row of the block table.
    pub(super) fn write_contexts(&self, r: &mut Recording<'_>, rows: &[Row]) -> Result<usize, EngineError> {
        let longest = rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(1);
        let blocks = blocks_for(longest);
        let mut table_rows: HashMap<u32, u32> = HashMap::new();
        let (mut slots, mut queries, mut table, mut turns) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            let sequence = self.sequence(row.sequence)?;
            slots.push(self.slot(row.sequence, row.position)?);
            let next = table_rows.len() as u32;
            let table_row = *table_rows.entry(row.sequence).or_insert_with(|| {
                let held = sequence.blocks().iter().copied().chain(std::iter::repeat(0));
                table.extend(held.take(blocks));
                next
            });
            if let Some(rope) = &self.decoder.spec.attention.rope {
                turns.extend(rope.turns(row.position, sequence.known_at(row.position)));
            }
            queries.push(Query { position: row.position, table_row });
        }
        let s = &self.decoder.scratch;
        r.write(&s.kv_slots, 0, &slots);
        r.write(&s.queries, 0, &queries);
        r.hold(&s.block_table, &table);
        r.write(&s.turns, 0, &turns);
        Ok(blocks)
    }

    /// Writes the keys and values that waited for this layer into the cache, the last of them (at most [`KV_CHUNK`]) with
    /// the caller's next submission: so many rows lie ready for [`Decoder::append_arrived`].
    ///
    /// [`Decoder::append_arrived`]: crate::model::decoder::Decoder::append_arrived
    pub(super) fn take_arrived(&mut self, layer: usize) -> Result<usize, EngineError> {
        let waiting = self.coherence.take(layer as u16);
        let mut chunks = waiting.chunks(KV_CHUNK).peekable();
        while let Some(chunk) = chunks.next() {
            self.upload_arrived(chunk)?;
            if chunks.peek().is_none() {
                return Ok(chunk.len());
            }
            let mut r = self.decoder.record();
            self.decoder.append_arrived(&mut r, layer, chunk.len());
            r.submit()?;
        }
        Ok(0)
    }

    fn upload_arrived(&self, chunk: &[Arrived]) -> Result<(), EngineError> {
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        let rope = self.spec().attention.rope.as_ref().filter(|_| self.decoder.remade.is_some());
        let stride = if self.decoder.remade.is_some() { 4 * self.spec().h4() } else { 1 };
        let mut slots = Vec::with_capacity(chunk.len());
        let (mut values, mut turns) = (Vec::new(), Vec::new());
        for arrived in chunk {
            slots.push(self.slot(arrived.sequence, arrived.position)?);
            values.extend_from_slice(&arrived.values);
            values.resize(values.len().next_multiple_of(stride), 0.0);
            if let Some(rope) = rope {
                let length = self.sequence(arrived.sequence)?.known_at(arrived.position);
                turns.extend(rope.turns(arrived.position, length));
            }
        }
        gpu.write(&s.kv_arrived_slots, 0, &slots);
        match &self.decoder.remade {
            Some(remade) => {
                gpu.write(&remade.x, 0, &values);
                gpu.write(&remade.turns, 0, &turns);
            }
            None => gpu.write(&s.kv_arrived, 0, &values),
        }
        Ok(())
    }

    /// What the cache holds of positions of a sequence that are all there.
    pub(crate) fn read_context(
        &mut self,
        layer: usize,
        sequence: u32,
        positions: std::ops::Range<u32>,
    ) -> Result<Vec<Vec<u32>>, EngineError> {
        // Some of it may have come and not been written yet.
        let arrived = self.take_arrived(layer)?;
        let (form, width) = (self.decoder.cache_form, 4 * self.spec().attention.cache4());
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        decoder.append_arrived(&mut r, layer, arrived);
        // Whole blocks, in which rows lie part by part.
        let words = BLOCK * form.stride(width);
        let part = decoder.cache_part4() * form.texel_words() as usize;
        let slots = positions.map(|position| Ok(self.slot(sequence, position)? as usize));
        let slots = slots.collect::<Result<Vec<_>, EngineError>>()?;
        let blocks: Vec<&[usize]> = slots.chunk_by(|a, b| a / BLOCK == b / BLOCK).collect();
        for of_block in &blocks {
            let first = (of_block[0] / BLOCK * words) as u64;
            r.read::<u32>(&decoder.cache[layer], 4 * first, words);
        }
        let read = r.submit()?.fetch()?;
        let mut rows = Vec::with_capacity(slots.len());
        for (of_block, bytes) in blocks.into_iter().zip(read) {
            let block = super::words(Some(bytes));
            let row = |slot: usize| {
                let at = |word| block[form.place(width, part, (slot % BLOCK, word))];
                (0..form.words(width)).map(at).collect()
            };
            rows.extend(of_block.iter().map(|&slot| row(slot)));
        }
        Ok(rows)
    }

    /// Puts the rows' keys and values with what is to be sent to the rest of the layer's domain.
    pub(crate) fn gather_contexts(
        &self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
        bulk: &mut Bulk,
    ) -> Result<(), EngineError> {
        if routed.context.is_empty() {
            return Ok(());
        }
        let me = self.me();
        let attention = &self.spec().attention;
        let (width, form) = self.decoder.kv_wire();
        let (stride, first) = match &self.decoder.remade {
            Some(_) => (4 * self.spec().h4(), 0),
            None => (4 * attention.qkv4(), 4 * attention.q4()),
        };
        let previous = self.spec().moe_before(layer).map(LayerId::from);
        for (t, row) in rows.iter().enumerate() {
            let home = self.sequence(row.sequence)?.start.home;
            let words = form.pack(&routed.context[t * stride + first..][..width]);
            let domain = self.tables.domain(self.groups, previous, home);
            for to in domain.into_iter().filter(|to| *to != me) {
                bulk.payloads.to(to).kv(layer as u16, row.sequence, row.position, &words);
            }
        }
        Ok(())
    }
}

/// Keys and values on their way out, by the rank that they go to.
#[derive(Default)]
pub(crate) struct Bulk {
    payloads: Payloads,
}

impl Bulk {
    pub(crate) fn new(ranks: usize) -> Self {
        Self { payloads: Payloads::new(ranks) }
    }

    /// Puts what the cache holds of one (layer, sequence, position) with what goes to a rank.
    pub(crate) fn add(&mut self, to: Rank, (layer, sequence, position): (u16, u32, u32), words: &[u32]) {
        self.payloads.to(to).kv(layer, sequence, position, words);
    }

    /// Bytes to all ranks together.
    pub(crate) fn bytes(&self) -> usize {
        self.payloads.bytes()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    /// Sends what there is, a frame to each rank.
    pub(crate) fn send(&mut self, comm: &mut dyn Communicator) -> Result<(), EngineError> {
        for to in (0..comm.world_size()).map(Rank::from) {
            let payload = self.payloads.take(to);
            if !payload.is_empty() {
                comm.send_bulk(to, payload)?;
            }
        }
        Ok(())
    }

    /// Forgets what there is.
    pub(crate) fn clear(&mut self) {
        self.payloads.clear();
    }
}

//! Contexts: where the keys and values of a step's rows are, and how they get to the rest of a layer's domain.

use super::super::coherence::{Arrived, blocks_for};
use super::super::frames::{Reader, Writer};
use super::{Routed, Row, Stepper};
use crate::EngineError;
use crate::model::scratch::KV_CHUNK;
use bytes::Bytes;
use exflow_placement::{LayerId, Rank};
use exflow_shaders::params::Query;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a token may wait for its context before the step fails.
const CONTEXT_TIMEOUT: Duration = Duration::from_secs(30);

impl Stepper<'_> {
    /// Waits until every row's context is complete at this layer.
    pub(super) fn await_contexts(&mut self, layer: usize, rows: &[Row]) -> Result<(), EngineError> {
        let deadline = Instant::now() + CONTEXT_TIMEOUT;
        let mut wait = Duration::ZERO;
        loop {
            while let Some((from, bytes)) = self.comm.recv_bulk(wait)? {
                self.take_in(from, &bytes)?;
                wait = Duration::ZERO;
            }
            let missing =
                rows.iter().find(|r| !self.coherence.is_complete(layer as u16, r.sequence, r.position));
            let Some(row) = missing else { return Ok(()) };
            if Instant::now() > deadline {
                return Err(EngineError::Internal(format!(
                    "layer {layer}: the context of sequence {} before position {} did not arrive",
                    row.sequence, row.position
                )));
            }
            wait = Duration::from_millis(50);
        }
    }

    /// Takes in keys and values that a peer made; those of sequences that ended are dropped.
    pub(super) fn take_in(&mut self, from: Rank, bytes: &Bytes) -> Result<(), EngineError> {
        let frame =
            Reader::new(bytes, from).kv(4 * self.spec().attention.cache4(), self.decoder.cache_form)?;
        if usize::from(frame.layer) >= self.spec().layers {
            return Err(EngineError::Internal(format!("rank {from} sent keys of layer {}", frame.layer)));
        }
        for (sequence, position, values) in frame.rows {
            let Some(running) = self.sequences.running.get(&sequence) else { continue };
            if running.slot(position).is_none() {
                return Err(EngineError::Internal(format!("rank {from} sent keys of position {position}")));
            }
            self.coherence.receive(frame.layer, Arrived { sequence, position, values });
        }
        Ok(())
    }

    /// Writes slots, queries, turns and block table of the rows; returns the length of a row of the block table.
    pub(super) fn write_contexts(&mut self, rows: &[Row]) -> Result<usize, EngineError> {
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
                let length = (sequence.start.known as usize).max(row.position as usize + 1);
                turns.extend(rope.turns(row.position, length));
            }
            queries.push(Query { position: row.position, table_row });
        }
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        gpu.write(&s.kv_slots, 0, &slots);
        gpu.write(&s.queries, 0, &queries);
        gpu.write(&s.block_table, 0, &table);
        gpu.write(&s.turns, 0, &turns);
        Ok(blocks)
    }

    /// Writes the keys and values that waited for this layer into the cache.
    pub(super) fn append_arrived(&mut self, layer: usize) -> Result<(), EngineError> {
        let waiting = self.coherence.take(layer as u16);
        for chunk in waiting.chunks(KV_CHUNK) {
            let mut slots = Vec::with_capacity(chunk.len());
            let mut values = Vec::new();
            for arrived in chunk {
                slots.push(self.slot(arrived.sequence, arrived.position)?);
                values.extend_from_slice(&arrived.values);
            }
            let s = &self.decoder.scratch;
            self.decoder.gpu.write(&s.kv_arrived, 0, &values);
            self.decoder.gpu.write(&s.kv_arrived_slots, 0, &slots);
            let mut r = self.decoder.record();
            self.decoder.append_arrived(&mut r, layer, chunk.len());
            r.submit()?;
        }
        Ok(())
    }

    /// Sends the rows' keys and values to the rest of the layer's domain, in the background.
    pub(crate) fn spread_contexts(
        &mut self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
    ) -> Result<(), EngineError> {
        if routed.qkv.is_empty() {
            return Ok(());
        }
        let me = self.me();
        let attention = &self.spec().attention;
        let (stride, first, width) = (4 * attention.qkv4(), 4 * attention.q4(), 4 * attention.cache4());
        let previous = self.spec().moe_before(layer).map(LayerId::from);
        let mut payloads: Vec<Option<Writer>> = (0..self.comm.world_size()).map(|_| None).collect();
        for (t, row) in rows.iter().enumerate() {
            let home = self.sequence(row.sequence)?.start.home;
            for to in self.table.domain(previous, home).into_iter().filter(|to| *to != me) {
                let payload = payloads[to.index()].get_or_insert_with(|| {
                    let mut writer = Writer::default();
                    writer.u16(layer as u16);
                    writer
                });
                let values = &routed.qkv[t * stride + first..][..width];
                payload.u32(row.sequence).u32(row.position);
                for word in self.decoder.cache_form.pack(values) {
                    payload.u32(word);
                }
            }
        }
        for (to, payload) in payloads.into_iter().enumerate() {
            if let Some(payload) = payload {
                self.comm.send_bulk(Rank::from(to), payload.finish())?;
            }
        }
        Ok(())
    }
}

//! One step of a rank: its tokens from embedding to sampled ids, with the exchanges between.

use super::coherence::{Arrived, Coherence, blocks_for};
use super::experts::PairList;
use super::frames::{Choice, PartialFrame, Reader, RowFrame, Writer};
use super::sequence::{Sequence, Sequences};
use super::stats::RankStats;
use super::worker::Captured;
use crate::model::decoder::Decoder;
use crate::model::scratch::KV_CHUNK;
use crate::options::Combine;
use crate::{EngineError, ModelSpec};
use bytes::Bytes;
use exflow_placement::{ExpertId, LayerId, PlacementTable, Rank, Route, Strategy};
use exflow_shaders::NO_SLOT;
use exflow_shaders::params::{Pair, Query};
use exflow_transport::{ByteClass, Communicator, RoundId};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A token on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// The rank that served its main choice at the layer before.
    main: Option<Rank>,
}

/// Which tokens a step works on.
pub(crate) struct Batch {
    pub(crate) decode: bool,
    /// This rank's tokens with their ids.
    pub(crate) tokens: Vec<(Row, u32)>,
    /// Tokens of all ranks together.
    pub(crate) total: usize,
}

/// What a step yields on one rank.
#[derive(Default)]
pub(crate) struct Outcome {
    /// (sequence, sampled token), for the sequences whose last token ended up here.
    pub(crate) sampled: Vec<(u32, u32)>,
    pub(crate) captured: Vec<Captured>,
}

/// What a step works with.
pub(crate) struct Stepper<'a> {
    pub(crate) decoder: &'a mut Decoder,
    pub(crate) comm: &'a mut dyn Communicator,
    pub(crate) table: &'a PlacementTable,
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) sequences: &'a Sequences,
    pub(crate) coherence: &'a mut Coherence,
    pub(crate) stats: &'a mut RankStats,
    pub(crate) round: &'a mut u64,
}

/// How long a token may wait for its context before the step fails.
const CONTEXT_TIMEOUT: Duration = Duration::from_secs(30);

impl Row {
    pub(crate) fn new(sequence: u32, position: u32) -> Self {
        Self { sequence, position, main: None }
    }
}

/// What the device said of a layer's rows.
struct Routed {
    chosen: Vec<u32>,
    weights: Vec<f32>,
    /// `[T, H]`, padded.
    residual: Vec<f32>,
    /// `[T, 3, heads * D]`, empty where nobody needs keys and values.
    qkv: Vec<f32>,
    routes: Vec<Route>,
}

/// Work that a layer has on this rank, own rows first, then arrived ones.
#[derive(Default)]
struct Work {
    /// Rows on this device: (row, its routing as far as it is known here).
    partial_of: HashMap<(u32, u32, u16), u32>,
    /// Partials that leave: (to, sequence, position, k, row of `partials`).
    leaving: Vec<(Rank, u32, u32, u16, u32)>,
    next_slot: u32,
    pairs: usize,
    tiles: usize,
}

impl Stepper<'_> {
    fn spec(&self) -> &ModelSpec {
        &self.decoder.spec
    }

    fn me(&self) -> Rank {
        self.comm.rank()
    }

    fn sequence(&self, id: u32) -> Result<&Sequence, EngineError> {
        self.sequences
            .running
            .get(&id)
            .ok_or_else(|| EngineError::Internal(format!("a row of sequence {id}, which does not run")))
    }

    /// Runs one step over all layers and samples.
    pub(crate) fn run(&mut self, batch: &Batch) -> Result<Outcome, EngineError> {
        let top_k = self.spec().top_k;
        self.decoder.reserve(batch.total, batch.total * top_k)?;
        let rows: Vec<Row> = batch.tokens.iter().map(|(row, _)| *row).collect();
        let ids: Vec<[u32; 2]> = batch.tokens.iter().map(|(row, id)| [*id, row.position]).collect();
        self.decoder.gpu.write(&self.decoder.scratch.tokens, 0, &ids);
        match self.comm.world_size() {
            1 => self.run_alone(rows),
            _ => self.run_together(rows, batch),
        }
    }

    /// One rank: the whole step is one submission; only the sampled ids (and what is captured) are read back.
    fn run_alone(&mut self, rows: Vec<Row>) -> Result<Outcome, EngineError> {
        let (layers, top_k) = (self.spec().layers, self.spec().top_k);
        let blocks = self.write_contexts(&rows)?;
        let count = rows.len();
        let s = &self.decoder.scratch;
        self.decoder.gpu.write(&s.source, 0, &(0..count as u32).collect::<Vec<_>>());
        self.decoder.gpu.write(&s.slots, 0, &(0..(count * top_k) as u32).collect::<Vec<_>>());
        let heads = self.head_rows(&rows)?;
        let capture = self.captures_routes(&rows)?;

        let decoder = &*self.decoder;
        let mut r = decoder.record();
        decoder.embed(&mut r, count);
        for layer in 0..layers {
            decoder.attend_and_route(&mut r, layer, count, blocks);
            decoder.all_experts(&mut r, layer, count);
            decoder.combine(&mut r, count);
        }
        decoder.head(&mut r, heads.len());
        r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        let logits = self.captures_logits(&rows)?;
        if logits {
            r.read::<f32>(&decoder.scratch.logits, 0, heads.len() * 4 * decoder.spec.v4());
        }
        for layer in (0..layers).filter(|_| capture) {
            r.read::<u32>(&decoder.scratch.chosen[layer], 0, count * top_k);
            r.read::<f32>(&decoder.scratch.weights[layer], 0, count * top_k);
        }
        let mut parts = r.submit()?.fetch()?.into_iter();
        self.stats.pairs += (count * top_k * layers) as u64;
        let sampled = words(parts.next());
        let logits = if logits { floats(parts.next()) } else { Vec::new() };
        let mut outcome = self.sampled(&rows, &heads, &sampled, &logits)?;
        for layer in (0..layers).filter(|_| capture) {
            let (chosen, weights) = (words(parts.next()), floats(parts.next()));
            self.capture_routes(&mut outcome.captured, layer, &rows, &chosen, &weights)?;
        }
        Ok(outcome)
    }

    /// Several ranks: one read-back and one or two exchanges a layer.
    fn run_together(&mut self, mut rows: Vec<Row>, batch: &Batch) -> Result<Outcome, EngineError> {
        let mut captured = Vec::new();
        for layer in 0..self.spec().layers {
            rows = self.layer(layer, rows, batch.decode, &mut captured)?;
        }
        let mut outcome = self.sample(&rows)?;
        outcome.captured.append(&mut captured);
        Ok(outcome)
    }

    /// One layer: attention and router, dispatch, experts, combine. Returns the rows that are here afterwards.
    fn layer(
        &mut self,
        layer: usize,
        rows: Vec<Row>,
        decode: bool,
        captured: &mut Vec<Captured>,
    ) -> Result<Vec<Row>, EngineError> {
        // The context of a prompt is made in the step itself; a decoded token's may still be on its way.
        self.await_contexts(layer, if decode { &rows } else { &[] })?;
        // A prompt is prefilled where it lives; its tokens become coherent when they decode.
        let strategy = if decode { self.strategy } else { Strategy::Vanilla };
        let routed = self.attend(layer, &rows, strategy)?;
        if self.captures_routes(&rows)? {
            self.capture_routes(captured, layer, &rows, &routed.chosen, &routed.weights)?;
        }
        if decode {
            self.count_stays(&rows, &routed);
        }

        let dispatched = self.dispatch(layer, &rows, &routed, decode)?;
        self.spread_contexts(layer, &rows, &routed)?;
        let mut work = Work::default();
        self.run_own(layer, &rows, &routed, &mut work)?;
        let arrived = self.arrive(dispatched, layer, rows.len())?;
        self.run_arrived(layer, &arrived, rows.len(), &mut work)?;

        let combines = strategy == Strategy::Vanilla || self.spec().top_k > 1;
        let received = if combines { self.exchange_partials(layer, &work, decode)? } else { Vec::new() };
        self.settle(&rows, &routed, &arrived, received, &mut work)
    }

    /// Waits until every row's context is complete at this layer.
    fn await_contexts(&mut self, layer: usize, rows: &[Row]) -> Result<(), EngineError> {
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
    fn take_in(&mut self, from: Rank, bytes: &Bytes) -> Result<(), EngineError> {
        let frame = Reader::new(bytes, from).kv(2 * 4 * self.spec().kv4())?;
        if usize::from(frame.layer) >= self.spec().layers {
            return Err(EngineError::Internal(format!("rank {from} sent keys of layer {}", frame.layer)));
        }
        for (sequence, position, values) in frame.rows {
            let Some(running) = self.sequences.running.get(&sequence) else { continue };
            if position as usize >= running.blocks.len() * super::BLOCK {
                return Err(EngineError::Internal(format!("rank {from} sent keys of position {position}")));
            }
            self.coherence.receive(frame.layer, Arrived { sequence, position, values });
        }
        Ok(())
    }

    /// Writes slots, queries and block table of the rows; returns the length of a row of the block table.
    fn write_contexts(&mut self, rows: &[Row]) -> Result<usize, EngineError> {
        let longest = rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(1);
        let blocks = blocks_for(longest);
        let mut table_rows: HashMap<u32, u32> = HashMap::new();
        let (mut slots, mut queries, mut table) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            let sequence = self.sequence(row.sequence)?;
            slots.push(sequence.slot(row.position));
            let next = table_rows.len() as u32;
            let table_row = *table_rows.entry(row.sequence).or_insert_with(|| {
                let held = sequence.blocks.iter().copied().chain(std::iter::repeat(0));
                table.extend(held.take(blocks));
                next
            });
            queries.push(Query { position: row.position, table_row });
        }
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        gpu.write(&s.kv_slots, 0, &slots);
        gpu.write(&s.queries, 0, &queries);
        gpu.write(&s.block_table, 0, &table);
        Ok(blocks)
    }

    /// Attention and router of this rank's rows, and the plan of their routes.
    fn attend(&mut self, layer: usize, rows: &[Row], strategy: Strategy) -> Result<Routed, EngineError> {
        if rows.is_empty() {
            let (chosen, weights) = (Vec::new(), Vec::new());
            return Ok(Routed { chosen, weights, residual: Vec::new(), qkv: Vec::new(), routes: Vec::new() });
        }
        self.append_arrived(layer)?;
        let blocks = self.write_contexts(rows)?;
        let (count, top_k) = (rows.len(), self.spec().top_k);
        let spread = self.strategy == Strategy::Coherent;
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        if layer == 0 {
            decoder.embed(&mut r, count);
        }
        decoder.attend_and_route(&mut r, layer, count, blocks);
        r.read::<u32>(&decoder.scratch.chosen[layer], 0, count * top_k);
        r.read::<f32>(&decoder.scratch.weights[layer], 0, count * top_k);
        r.read::<f32>(decoder.scratch.x(), 0, count * 4 * decoder.spec.h4());
        if spread {
            r.read::<f32>(&decoder.scratch.qkv, 0, count * 12 * decoder.spec.kv4());
        }
        let mut parts = r.submit()?.fetch()?.into_iter();
        let (chosen, weights, residual) = (words(parts.next()), floats(parts.next()), floats(parts.next()));
        let qkv = if spread { floats(parts.next()) } else { Vec::new() };
        for row in rows {
            self.coherence.note(layer as u16, row.sequence, row.position);
        }
        let me = self.me();
        let route = |t: usize| {
            let range = t * top_k..(t + 1) * top_k;
            let experts: Vec<_> = chosen[range.clone()].iter().map(|&e| ExpertId::from(e as usize)).collect();
            self.table.route(strategy, LayerId::from(layer), me, &experts, &weights[range])
        };
        let routes = (0..count).map(route).collect();
        Ok(Routed { chosen, weights, residual, qkv, routes })
    }

    /// Writes the keys and values that waited for this layer into the cache.
    fn append_arrived(&mut self, layer: usize) -> Result<(), EngineError> {
        let waiting = self.coherence.take(layer as u16);
        for chunk in waiting.chunks(KV_CHUNK) {
            let mut slots = Vec::with_capacity(chunk.len());
            let mut values = Vec::new();
            for arrived in chunk {
                slots.push(self.sequence(arrived.sequence)?.slot(arrived.position));
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

    fn next_round(&mut self, class: ByteClass, layer: usize) -> RoundId {
        let number = *self.round;
        *self.round += 1;
        RoundId { number, class, layer: layer as u16 }
    }

    /// Begins the dispatch: one row to each rank that serves one of its experts.
    fn dispatch(
        &mut self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
        decode: bool,
    ) -> Result<RoundId, EngineError> {
        let (me, top_k, hidden) = (self.me(), self.spec().top_k, self.spec().hidden);
        let stride = 4 * self.spec().h4();
        let mut payloads: Vec<Writer> = (0..self.comm.world_size()).map(|_| Writer::default()).collect();
        for (t, (row, route)) in rows.iter().zip(&routed.routes).enumerate() {
            for to in route.ranks().into_iter().filter(|to| *to != me) {
                let choice = |k: usize| Choice {
                    k: k as u16,
                    expert: routed.chosen[t * top_k + k] as u16,
                    weight: routed.weights[t * top_k + k],
                };
                let served = (0..top_k).filter(|&k| route.serving[k] == to);
                payloads[to.index()].row(&RowFrame {
                    sequence: row.sequence,
                    position: row.position,
                    next: route.next,
                    main: route.serving[0],
                    expects: expected(route, self.combine),
                    choices: served.map(choice).collect(),
                    residual: routed.residual[t * stride..t * stride + hidden].to_vec(),
                });
                self.stats.crossings += u64::from(decode);
            }
        }
        let round = self.next_round(ByteClass::Dispatch, layer);
        self.comm.start_exchange(round, payloads.into_iter().map(Writer::finish).collect())?;
        Ok(round)
    }

    /// Sends the rows' keys and values to the rest of the layer's domain, in the background.
    fn spread_contexts(&mut self, layer: usize, rows: &[Row], routed: &Routed) -> Result<(), EngineError> {
        if routed.qkv.is_empty() {
            return Ok(());
        }
        let me = self.me();
        let width = 4 * self.spec().kv4();
        let previous = layer.checked_sub(1).map(LayerId::from);
        let mut payloads: Vec<Option<Writer>> = (0..self.comm.world_size()).map(|_| None).collect();
        for (t, row) in rows.iter().enumerate() {
            let home = self.sequence(row.sequence)?.start.home;
            for to in self.table.domain(previous, home).into_iter().filter(|to| *to != me) {
                let payload = payloads[to.index()].get_or_insert_with(|| {
                    let mut writer = Writer::default();
                    writer.u16(layer as u16);
                    writer
                });
                let values = &routed.qkv[(3 * t + 1) * width..(3 * t + 3) * width];
                payload.u32(row.sequence).u32(row.position).floats(values);
            }
        }
        for (to, payload) in payloads.into_iter().enumerate() {
            if let Some(payload) = payload {
                self.comm.send_bulk(Rank::from(to), payload.finish())?;
            }
        }
        Ok(())
    }

    /// Starts the experts of the rows that are here, before any other row arrives.
    fn run_own(
        &mut self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let (me, top_k) = (self.me(), self.spec().top_k);
        let mut choices = Vec::new();
        for (t, (row, route)) in rows.iter().zip(&routed.routes).enumerate() {
            for k in (0..top_k).filter(|&k| route.serving[k] == me) {
                let (expert, weight) = (routed.chosen[t * top_k + k], routed.weights[t * top_k + k]);
                choices.push((t, *row, route.next, k as u16, expert as u16, weight));
            }
        }
        let list = self.plan(layer, &choices, work)?;
        let mut r = self.decoder.record();
        self.upload(&list, work);
        if let Some(batch) = list.batch {
            self.decoder.experts(&mut r, layer, batch);
            r.submit()?;
        }
        Ok(())
    }

    /// Waits for the dispatched rows and puts them behind this rank's own.
    fn arrive(&mut self, round: RoundId, layer: usize, own: usize) -> Result<Vec<RowFrame>, EngineError> {
        let me = self.me();
        let hidden = self.spec().hidden;
        let mut arrived = Vec::new();
        for (from, bytes) in self.comm.finish_exchange(round)?.iter().enumerate() {
            if Rank::from(from) != me {
                arrived.extend(Reader::new(bytes, Rank::from(from)).rows(hidden)?);
            }
        }
        let stride = 4 * self.spec().h4();
        let mut residual = Vec::with_capacity(arrived.len() * stride);
        for row in &arrived {
            self.sequence(row.sequence)?;
            residual.extend_from_slice(&row.residual);
            residual.resize(residual.len().next_multiple_of(stride), 0.0);
        }
        let offset = (own * stride * 4) as u64;
        let x = self.decoder.scratch.x();
        if offset + 4 * residual.len() as u64 > x.bytes() {
            let count = arrived.len();
            return Err(EngineError::Internal(format!("layer {layer}: {count} rows arrived, too many")));
        }
        self.decoder.gpu.write(x, offset, &residual);
        Ok(arrived)
    }

    fn run_arrived(
        &mut self,
        layer: usize,
        arrived: &[RowFrame],
        own: usize,
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let mut choices = Vec::new();
        for (i, frame) in arrived.iter().enumerate() {
            let row = Row::new(frame.sequence, frame.position);
            let of = |c: &Choice| (own + i, row, frame.next, c.k, c.expert, c.weight);
            choices.extend(frame.choices.iter().map(of));
        }
        let list = self.plan(layer, &choices, work)?;
        self.upload(&list, work);
        let mut r = self.decoder.record();
        if let Some(batch) = list.batch {
            self.decoder.norm_arrived(&mut r, layer, own, arrived.len());
            self.decoder.experts(&mut r, layer, batch);
            r.submit()?;
        }
        Ok(())
    }

    /// Gives every (row, choice) a local expert and a row of `partials`.
    #[allow(clippy::type_complexity, reason = "a row of a list that lives for one call")]
    fn plan(
        &mut self,
        layer: usize,
        choices: &[(usize, Row, Rank, u16, u16, f32)],
        work: &mut Work,
    ) -> Result<PairList, EngineError> {
        let me = self.me();
        let mut pairs = Vec::with_capacity(choices.len());
        for &(row_index, row, next, k, expert, weight) in choices {
            let local = self.decoder.weights.layers[layer].experts.local.get(usize::from(expert));
            let local = local.copied().flatten().ok_or_else(|| {
                EngineError::Internal(format!("layer {layer}: expert {expert} is not on rank {me}"))
            })?;
            let slot = work.next_slot;
            work.next_slot += 1;
            match next == me {
                true => drop(work.partial_of.insert((row.sequence, row.position, k), slot)),
                false => work.leaving.push((next, row.sequence, row.position, k, slot)),
            }
            pairs.push(Pair { row: row_index as u32, slot, weight, expert: local });
        }
        self.stats.pairs += pairs.len() as u64;
        Ok(PairList::new(pairs, work.pairs, work.tiles))
    }

    fn upload(&self, list: &PairList, work: &mut Work) {
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        gpu.write(&s.pairs_list, 16 * work.pairs as u64, &list.pairs);
        gpu.write(&s.tiles, 16 * work.tiles as u64, &list.tiles);
        work.pairs += list.pairs.len();
        work.tiles += list.tiles.len();
    }

    /// The combine: partials travel to their tokens' next residence.
    fn exchange_partials(
        &mut self,
        layer: usize,
        work: &Work,
        decode: bool,
    ) -> Result<Vec<PartialFrame>, EngineError> {
        let (me, hidden, stride) = (self.me(), self.spec().hidden, 4 * self.spec().h4());
        let mut values = Vec::new();
        if !work.leaving.is_empty() {
            let mut r = self.decoder.record();
            r.read::<f32>(&self.decoder.scratch.partials, 0, work.next_slot as usize * stride);
            values = floats(r.submit()?.fetch()?.pop());
        }
        let mut payloads: Vec<Writer> = (0..self.comm.world_size()).map(|_| Writer::default()).collect();
        for (to, sequence, position, k, partial) in self.gather_leaving(work, &values, stride, hidden) {
            payloads[to.index()].partial(sequence, position, k, &partial);
            self.stats.crossings += u64::from(decode);
        }
        let round = self.next_round(ByteClass::Combine, layer);
        let payloads = payloads.into_iter().map(Writer::finish).collect();
        let mut received = Vec::new();
        for (from, bytes) in self.comm.exchange(round, payloads)?.iter().enumerate() {
            if Rank::from(from) != me {
                received.extend(Reader::new(bytes, Rank::from(from)).partials(hidden)?);
            }
        }
        Ok(received)
    }

    /// The partials that leave: one per expert, or one per token where a rank's partials are summed first.
    #[allow(clippy::type_complexity, reason = "a row of a list that lives for one call")]
    fn gather_leaving(
        &self,
        work: &Work,
        values: &[f32],
        stride: usize,
        hidden: usize,
    ) -> Vec<(Rank, u32, u32, u16, Vec<f32>)> {
        let mut leaving: Vec<(Rank, u32, u32, u16, Vec<f32>)> = Vec::new();
        for &(to, sequence, position, k, slot) in &work.leaving {
            let partial = &values[slot as usize * stride..][..hidden];
            match leaving.last_mut() {
                Some(last) if self.combine == Combine::Sum && (last.1, last.2) == (sequence, position) => {
                    last.4.iter_mut().zip(partial).for_each(|(sum, v)| *sum += v);
                }
                _ => leaving.push((to, sequence, position, k, partial.to_vec())),
            }
        }
        leaving
    }

    /// Puts the rows that are here from now on in order and adds their partials.
    fn settle(
        &mut self,
        rows: &[Row],
        routed: &Routed,
        arrived: &[RowFrame],
        received: Vec<PartialFrame>,
        work: &mut Work,
    ) -> Result<Vec<Row>, EngineError> {
        let (me, top_k, stride) = (self.me(), self.spec().top_k, 4 * self.spec().h4());
        let first_received = work.next_slot;
        let mut values = Vec::with_capacity(received.len() * stride);
        let mut remote: HashMap<(u32, u32), u16> = HashMap::new();
        for partial in &received {
            work.partial_of.insert((partial.sequence, partial.position, partial.k), work.next_slot);
            work.next_slot += 1;
            *remote.entry((partial.sequence, partial.position)).or_default() += 1;
            values.extend_from_slice(&partial.values);
            values.resize(values.len().next_multiple_of(stride), 0.0);
        }
        let s = &self.decoder.scratch;
        let offset = u64::from(first_received) * stride as u64 * 4;
        if offset + 4 * values.len() as u64 > s.partials.bytes() {
            return Err(EngineError::Internal(format!("{} partials arrived, too many", received.len())));
        }
        self.decoder.gpu.write(&s.partials, offset, &values);

        let staying = rows.iter().zip(&routed.routes).enumerate().filter(|(_, (_, route))| route.next == me);
        let staying = staying.map(|(t, (row, route))| {
            let row = Row { main: Some(route.serving[0]), ..*row };
            (row, t as u32, expected(route, self.combine))
        });
        let coming = arrived.iter().enumerate().filter(|(_, frame)| frame.next == me);
        let coming = coming.map(|(i, frame)| {
            let row = Row { sequence: frame.sequence, position: frame.position, main: Some(frame.main) };
            (row, (rows.len() + i) as u32, frame.expects)
        });
        let mut here: Vec<_> = staying.chain(coming).collect();
        here.sort_unstable();

        let mut slots = Vec::with_capacity(here.len() * top_k);
        for (row, _, expects) in &here {
            let came = remote.get(&(row.sequence, row.position)).copied().unwrap_or(0);
            if came != *expects {
                return Err(EngineError::Internal(format!(
                    "sequence {} at position {}: {came} partials came, {expects} were announced",
                    row.sequence, row.position
                )));
            }
            let slot = |k| work.partial_of.get(&(row.sequence, row.position, k as u16)).copied();
            slots.extend((0..top_k).map(|k| slot(k).unwrap_or(NO_SLOT)));
        }
        let source: Vec<u32> = here.iter().map(|(_, source, _)| *source).collect();
        self.decoder.gpu.write(&s.source, 0, &source);
        self.decoder.gpu.write(&s.slots, 0, &slots);
        let mut r = self.decoder.record();
        self.decoder.combine(&mut r, here.len());
        r.submit()?;
        Ok(here.into_iter().map(|(row, _, _)| row).collect())
    }

    /// Head and greedy choice for the rows that end a prompt or are decoded.
    fn sample(&mut self, rows: &[Row]) -> Result<Outcome, EngineError> {
        let heads = self.head_rows(rows)?;
        if heads.is_empty() {
            return Ok(Outcome::default());
        }
        let wants_logits = self.captures_logits(rows)?;
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        decoder.head(&mut r, heads.len());
        r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        if wants_logits {
            r.read::<f32>(&decoder.scratch.logits, 0, heads.len() * 4 * decoder.spec.v4());
        }
        let mut parts = r.submit()?.fetch()?.into_iter();
        let sampled = words(parts.next());
        let logits = floats(parts.next());
        self.sampled(rows, &heads, &sampled, &logits)
    }

    /// Uploads which rows the head is asked for: each sequence's last, or all where logits are captured.
    fn head_rows(&self, rows: &[Row]) -> Result<Vec<u32>, EngineError> {
        let mut heads = Vec::new();
        for (t, row) in rows.iter().enumerate() {
            let sequence = self.sequence(row.sequence)?;
            let is_last = row.position as usize + 1 >= sequence.start.prompt.len();
            if is_last || sequence.start.capture_logits {
                heads.push(t as u32);
            }
        }
        self.decoder.gpu.write(&self.decoder.scratch.head_rows, 0, &heads);
        Ok(heads)
    }

    fn sampled(
        &self,
        rows: &[Row],
        heads: &[u32],
        sampled: &[u32],
        logits: &[f32],
    ) -> Result<Outcome, EngineError> {
        let mut outcome = Outcome::default();
        let stride = 4 * self.spec().v4();
        for (i, (&t, &token)) in heads.iter().zip(sampled).enumerate() {
            let row = rows[t as usize];
            let sequence = self.sequence(row.sequence)?;
            if row.position as usize + 1 >= sequence.start.prompt.len() {
                outcome.sampled.push((row.sequence, token));
            }
            if sequence.start.capture_logits {
                let values = logits[i * stride..][..self.spec().vocab_size].to_vec();
                outcome.captured.push(Captured::Logits { position: row.position, values });
            }
        }
        Ok(outcome)
    }

    fn captures_routes(&self, rows: &[Row]) -> Result<bool, EngineError> {
        Ok(rows
            .iter()
            .any(|row| self.sequences.running.get(&row.sequence).is_some_and(|s| s.start.capture_routes)))
    }

    fn captures_logits(&self, rows: &[Row]) -> Result<bool, EngineError> {
        Ok(rows
            .iter()
            .any(|row| self.sequences.running.get(&row.sequence).is_some_and(|s| s.start.capture_logits)))
    }

    fn capture_routes(
        &self,
        captured: &mut Vec<Captured>,
        layer: usize,
        rows: &[Row],
        chosen: &[u32],
        weights: &[f32],
    ) -> Result<(), EngineError> {
        let top_k = self.spec().top_k;
        for (t, row) in rows.iter().enumerate() {
            if self.sequence(row.sequence)?.start.capture_routes {
                captured.push(Captured::Route {
                    sequence: row.sequence,
                    position: row.position,
                    layer: layer as u16,
                    experts: chosen[t * top_k..][..top_k].to_vec(),
                    weights: weights[t * top_k..][..top_k].to_vec(),
                });
            }
        }
        Ok(())
    }

    fn count_stays(&mut self, rows: &[Row], routed: &Routed) {
        for (row, route) in rows.iter().zip(&routed.routes) {
            if let Some(main) = row.main {
                self.stats.transitions += 1;
                self.stats.stays += u64::from(main == route.serving[0]);
            }
        }
    }
}

/// Partials that a token's next residence must expect from other ranks.
fn expected(route: &Route, combine: Combine) -> u16 {
    let remote = route.serving.iter().filter(|rank| **rank != route.next);
    match combine {
        Combine::Exact => remote.count() as u16,
        Combine::Sum => {
            let mut ranks: Vec<_> = remote.collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks.len() as u16
        }
    }
}

fn words(bytes: Option<Vec<u8>>) -> Vec<u32> {
    bytes.map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default()
}

fn floats(bytes: Option<Vec<u8>>) -> Vec<f32> {
    bytes.map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default()
}

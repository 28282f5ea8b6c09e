//! The two exchanges of a layer: rows go to their experts, partials to their tokens' next residence.

use super::super::frames::{Choice, PartialFrame, Reader, RowFrame};
use super::experts::Work;
use super::{Routed, Row, Stepper, floats};
use crate::EngineError;
use crate::options::{Combine, Overlap};
use bytes::Bytes;
use exflow_placement::{Rank, Route};
use exflow_transport::{ByteClass, RoundId};
use std::time::Instant;

impl Stepper<'_> {
    pub(super) fn next_round(&mut self, class: ByteClass, layer: usize) -> RoundId {
        let number = *self.round;
        *self.round += 1;
        RoundId { number, class, layer: layer as u16 }
    }

    /// Begins the dispatch: one row to each rank that serves one of its experts.
    pub(super) fn dispatch(
        &mut self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
        decode: bool,
    ) -> Result<RoundId, EngineError> {
        let _span = tracing::debug_span!("dispatch", layer, rows = rows.len()).entered();
        let (me, top_k, hidden) = (self.me(), self.spec().top_k, self.spec().hidden);
        let stride = 4 * self.spec().h4();
        for (t, (row, route)) in rows.iter().zip(&routed.routes).enumerate() {
            for to in route.ranks().into_iter().filter(|to| *to != me) {
                let choice = |k: usize| Choice {
                    k: k as u16,
                    expert: routed.chosen[t * top_k + k] as u16,
                    weight: routed.weights[t * top_k + k],
                };
                let served = (0..top_k).filter(|&k| route.serving[k] == to);
                self.payloads.to(to).row(&RowFrame {
                    sequence: row.sequence,
                    position: row.position,
                    edition: row.edition,
                    next: route.next,
                    main: route.serving[0],
                    expects: expected(route, self.combine),
                    choices: served.map(choice).collect(),
                    residual: &routed.residual[t * stride..t * stride + hidden],
                });
                self.stats.crossings += u64::from(decode);
            }
        }
        let round = self.next_round(ByteClass::Dispatch, layer);
        self.comm.start_exchange(round, self.payloads.take_all())?;
        Ok(round)
    }

    /// Waits for the dispatched rows and puts them behind this rank's own.
    pub(super) fn arrive(
        &mut self,
        round: RoundId,
        layer: usize,
        own: usize,
    ) -> Result<Vec<RowFrame>, EngineError> {
        let _span = tracing::debug_span!("arrive", layer, round = round.number).entered();
        let (me, hidden) = (self.me(), self.spec().hidden);
        let mut arrived = Vec::new();
        for (from, bytes) in self.comm.finish_exchange(round)?.iter().enumerate() {
            if Rank::from(from) != me {
                arrived.extend(Reader::new(bytes, Rank::from(from)).rows(hidden)?);
            }
        }
        self.put_arrived(layer, &arrived, own)?;
        Ok(arrived)
    }

    /// Runs the experts of the dispatched rows: those of a peer that come alone before the others' where that pays,
    /// the rest together. Returns the rows in the order in which they lie behind this rank's own.
    pub(super) fn run_as_they_come(
        &mut self,
        round: RoundId,
        (layer, decode): (usize, bool),
        own: usize,
        work: &mut Work,
    ) -> Result<Vec<RowFrame>, EngineError> {
        let peers = self.comm.world_size() - self.comm.absent().len() - 1;
        if peers < 2 || matches!(self.overlap, Overlap::Own | Overlap::Halves) {
            let arrived = self.arrive(round, layer, own)?;
            self.run_arrived(layer, &arrived, own, work)?;
            return Ok(arrived);
        }
        let _span = tracing::debug_span!("arrive", layer, round = round.number).entered();
        let hidden = self.spec().hidden;
        let (mut arrived, mut started): (Vec<RowFrame>, usize) = (Vec::new(), 0);
        let (mut first, mut waited) = (None, false);
        loop {
            let mut came = self.comm.arrivals(round, false)?;
            if came.frames.is_empty() && !came.whole {
                if started < arrived.len() && self.peers[usize::from(decode)].start_now(self.overlap) {
                    self.start_arrived((layer, decode), &arrived[started..], own + started, work)?;
                    started = arrived.len();
                    self.stats.peer_starts += 1;
                }
                waited |= first.is_some();
                came = self.comm.arrivals(round, true)?;
            }
            for (from, bytes) in &came.frames {
                arrived.extend(Reader::new(bytes, *from).rows(hidden)?);
            }
            if came.whole {
                break;
            }
            if !arrived.is_empty() {
                first.get_or_insert_with(Instant::now);
            }
        }
        if !arrived.is_empty() {
            self.peers[usize::from(decode)]
                .waited(first.filter(|_| waited).map_or(0.0, |first| first.elapsed().as_secs_f64()));
        }
        if started < arrived.len() {
            self.start_arrived((layer, decode), &arrived[started..], own + started, work)?;
        }
        Ok(arrived)
    }

    /// Puts rows at `at` on the device and starts their experts.
    fn start_arrived(
        &mut self,
        (layer, decode): (usize, bool),
        rows: &[RowFrame],
        at: usize,
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let began = Instant::now();
        self.put_arrived(layer, rows, at)?;
        self.run_arrived(layer, rows, at, work)?;
        self.peers[usize::from(decode)].started(began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Puts the residual streams of arrived rows behind this rank's own.
    pub(super) fn put_arrived(
        &self,
        layer: usize,
        arrived: &[RowFrame],
        own: usize,
    ) -> Result<(), EngineError> {
        let stride = 4 * self.spec().h4();
        let mut residual = Vec::with_capacity(arrived.len() * stride);
        for row in arrived {
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
        Ok(())
    }

    /// `[partials, H]`, padded: what this rank's experts made of the layer so far.
    pub(super) fn read_partials(&self, work: &Work) -> Result<Vec<f32>, EngineError> {
        let mut r = self.decoder.record();
        let count = work.next_slot as usize * 4 * self.spec().h4();
        r.read::<f32>(&self.decoder.scratch.partials, 0, count);
        Ok(floats(r.submit()?.fetch()?.pop()))
    }

    /// The combine: partials travel to their tokens' next residence.
    pub(super) fn exchange_partials(
        &mut self,
        layer: usize,
        work: &Work,
        decode: bool,
    ) -> Result<Vec<PartialFrame>, EngineError> {
        let _span = tracing::debug_span!("combine", layer).entered();
        let payloads = self.leaving_partials(work, decode)?;
        let round = self.next_round(ByteClass::Combine, layer);
        let received = self.comm.exchange(round, payloads)?;
        self.read_combine(&received)
    }

    /// The same, to be finished later.
    pub(super) fn start_combine(
        &mut self,
        layer: usize,
        work: &Work,
        decode: bool,
    ) -> Result<RoundId, EngineError> {
        let payloads = self.leaving_partials(work, decode)?;
        let round = self.next_round(ByteClass::Combine, layer);
        self.comm.start_exchange(round, payloads)?;
        Ok(round)
    }

    pub(super) fn finish_combine(&mut self, round: RoundId) -> Result<Vec<PartialFrame>, EngineError> {
        let received = self.comm.finish_exchange(round)?;
        self.read_combine(&received)
    }

    /// `[R]` payloads of partials.
    fn leaving_partials(&mut self, work: &Work, decode: bool) -> Result<Vec<Bytes>, EngineError> {
        let (hidden, stride) = (self.spec().hidden, 4 * self.spec().h4());
        let values = if work.leaving.is_empty() { Vec::new() } else { self.read_partials(work)? };
        for (to, sequence, position, k, partial) in self.gather_leaving(work, &values, stride, hidden) {
            self.payloads.to(to).partial(sequence, position, k, &partial);
            self.stats.crossings += u64::from(decode);
        }
        Ok(self.payloads.take_all())
    }

    fn read_combine(&self, received: &[Bytes]) -> Result<Vec<PartialFrame>, EngineError> {
        let (me, hidden) = (self.me(), self.spec().hidden);
        let mut partials = Vec::new();
        for (from, bytes) in received.iter().enumerate() {
            if Rank::from(from) != me {
                partials.extend(Reader::new(bytes, Rank::from(from)).partials(hidden)?);
            }
        }
        Ok(partials)
    }

    /// The partials that leave: one per expert, or one per token where a rank's partials are summed first.
    #[allow(clippy::type_complexity, reason = "a row of a list that lives for one call")]
    pub(super) fn gather_leaving(
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
                Some(last)
                    if self.combine == Combine::Sum
                        && (last.0, last.1, last.2) == (to, sequence, position) =>
                {
                    last.4.iter_mut().zip(partial).for_each(|(sum, v)| *sum += v);
                }
                _ => leaving.push((to, sequence, position, k, partial.to_vec())),
            }
        }
        leaving
    }
}

/// Partials that a token's next residence must expect from other ranks.
pub(crate) fn expected(route: &Route, combine: Combine) -> u16 {
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

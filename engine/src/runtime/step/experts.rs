//! The expert work of a layer: own rows first, then arrived ones, then everything that belongs to a row is added.

use super::super::experts::PairList;
use super::super::frames::{Choice, PartialFrame, RowFrame};
use super::exchange::expected;
use super::{Routed, Row, Stepper};
use crate::EngineError;
use crate::model::decoder::LocalFfn;
use exflow_placement::Rank;
use exflow_shaders::NO_SLOT;
use exflow_shaders::params::Pair;
use std::collections::HashMap;

/// Work that a layer has on this rank, own rows first, then arrived ones.
#[derive(Default)]
pub(super) struct Work {
    /// Rows on this device: (row, its routing as far as it is known here).
    pub(super) partial_of: HashMap<(u32, u32, u16), u32>,
    /// Partials that leave: (to, sequence, position, k, row of `partials`).
    pub(super) leaving: Vec<(Rank, u32, u32, u16, u32)>,
    pub(super) next_slot: u32,
    pub(super) pairs: usize,
    pub(super) tiles: usize,
}

impl Stepper<'_> {
    /// Starts the experts of the rows that are here, before any other row arrives.
    pub(super) fn run_own(
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
            self.decoder.ffn(&mut r, layer, LocalFfn::Experts, batch);
            r.submit()?;
        }
        Ok(())
    }

    pub(super) fn run_arrived(
        &mut self,
        layer: usize,
        arrived: &[RowFrame],
        own: usize,
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let mut choices = Vec::new();
        for (i, frame) in arrived.iter().enumerate() {
            let row = Row::new(frame.sequence, frame.position, frame.edition);
            let of = |c: &Choice| (own + i, row, frame.next, c.k, c.expert, c.weight);
            choices.extend(frame.choices.iter().map(of));
        }
        let list = self.plan(layer, &choices, work)?;
        self.upload(&list, work);
        let mut r = self.decoder.record();
        if let Some(batch) = list.batch {
            self.decoder.norm_ffn(&mut r, layer, own, arrived.len());
            self.decoder.ffn(&mut r, layer, LocalFfn::Experts, batch);
            r.submit()?;
        }
        Ok(())
    }

    /// The experts of rows that every rank has a copy of: each rank runs those that it serves, and sends what they make to
    /// all others, in the one exchange of the layer.
    pub(super) fn replicated_experts(
        &mut self,
        layer: usize,
        rows: &[Row],
        routed: &Routed,
    ) -> Result<Vec<Row>, EngineError> {
        let (me, top_k) = (self.me(), self.spec().top_k);
        let mut work = Work::default();
        self.run_own(layer, rows, routed, &mut work)?;
        for to in (0..self.comm.world_size()).map(Rank::from).filter(|to| *to != me) {
            for row in rows {
                let made = |k: u16| Some((k, *work.partial_of.get(&(row.sequence, row.position, k))?));
                let leaving = (0..top_k as u16).filter_map(made);
                work.leaving.extend(leaving.map(|(k, slot)| (to, row.sequence, row.position, k, slot)));
            }
        }
        let received = self.exchange_partials(layer, &work, false)?;
        self.settle(layer, rows, routed, &[], received, &mut work)
    }

    /// Gives every (row, choice) a local expert and a row of `partials`.
    #[allow(clippy::type_complexity, reason = "a row of a list that lives for one call")]
    pub(super) fn plan(
        &mut self,
        layer: usize,
        choices: &[(usize, Row, Rank, u16, u16, f32)],
        work: &mut Work,
    ) -> Result<PairList, EngineError> {
        let me = self.me();
        let mut pairs = Vec::with_capacity(choices.len());
        for &(row_index, row, next, k, expert, weight) in choices {
            let local = self.decoder.local_expert(layer, usize::from(expert)).ok_or_else(|| {
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
        Ok(PairList::new(pairs, (work.pairs, work.tiles), self.decoder.expert_cut()))
    }

    pub(super) fn upload(&self, list: &PairList, work: &mut Work) {
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        gpu.write(&s.pairs_list, 16 * work.pairs as u64, &list.pairs);
        gpu.write(&s.tiles, 16 * work.tiles as u64, &list.tiles);
        work.pairs += list.pairs.len();
        work.tiles += list.tiles.len();
    }

    /// The FFN of a dense layer, on the rows that are here.
    pub(super) fn run_dense(&mut self, layer: usize, rows: usize) -> Result<(), EngineError> {
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        let identity: Vec<u32> = (0..rows as u32).collect();
        gpu.hold(&s.source, &identity);
        gpu.hold(&s.dense_slots, &identity);
        let list = PairList::every(&identity, 0, (0, 0), self.decoder.cut());
        self.upload(&list, &mut Work::default());
        let mut r = self.decoder.record();
        if let Some(batch) = list.batch {
            self.decoder.ffn(&mut r, layer, LocalFfn::Every, batch);
            self.decoder.combine(&mut r, layer, rows);
            r.submit()?;
        }
        Ok(())
    }

    /// Puts the rows that are here from now on in order and adds their partials.
    pub(super) fn settle(
        &mut self,
        layer: usize,
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
            let row = Row::new(frame.sequence, frame.position, frame.edition);
            let row = Row { main: Some(frame.main), ..row };
            (row, (rows.len() + i) as u32, frame.expects)
        });
        let mut here: Vec<_> = staying.chain(coming).collect();
        here.sort_unstable();

        let first_shared = work.next_slot;
        let mut slots = Vec::with_capacity(here.len() * self.spec().partials());
        for (i, (row, _, expects)) in here.iter().enumerate() {
            let came = remote.get(&(row.sequence, row.position)).copied().unwrap_or(0);
            if came != *expects {
                return Err(EngineError::Internal(format!(
                    "sequence {} at position {}: {came} partials came, {expects} were announced",
                    row.sequence, row.position
                )));
            }
            let slot = |k| work.partial_of.get(&(row.sequence, row.position, k as u16)).copied();
            slots.extend((0..top_k).map(|k| slot(k).unwrap_or(NO_SLOT)));
            slots.extend(self.spec().shared.is_some().then_some(first_shared + i as u32));
        }
        let source: Vec<u32> = here.iter().map(|(_, source, _)| *source).collect();
        self.decoder.gpu.hold(&s.source, &source);
        self.decoder.gpu.hold(&s.slots, &slots);
        let shared = match self.spec().shared {
            Some(_) => PairList::every(&source, first_shared, (work.pairs, work.tiles), self.decoder.cut()),
            None => PairList::default(),
        };
        self.upload(&shared, work);
        let mut r = self.decoder.record();
        if let Some(batch) = shared.batch {
            self.decoder.ffn(&mut r, layer, LocalFfn::Every, batch);
        }
        self.decoder.combine(&mut r, layer, here.len());
        r.submit()?;
        Ok(here.into_iter().map(|(row, _, _)| row).collect())
    }
}

//! One hop of tokens in flow: out of one layer's FFN, through the next layer's attention, to its router, in a single
//! submission. Tokens come with their residual stream and leave with it, so that nothing on the device has to outlive
//! a hop.

use super::super::experts::PairList;
use super::super::flow::board::{Picked, Token};
use super::super::frames::Choice;
use super::{Outcome, Routed, Row, Stepper, floats, read_context, rows_of, words};
use crate::EngineError;
use crate::model::decoder::LocalFfn;
use exflow_shaders::NO_SLOT;
use exflow_shaders::params::Pair;

/// What a hop yields.
pub(crate) struct Hopped {
    /// The tokens' rows.
    pub(crate) rows: Vec<Row>,
    /// What the next layer's router said of them; empty after the last layer.
    pub(crate) routed: Routed,
    /// `[serves' choices, H]`, padded: partials, in order of the serves and of their choices.
    pub(crate) served: Vec<f32>,
    /// What was sampled after the last layer, and captured on the way.
    pub(crate) outcome: Outcome,
}

/// Pairs and rows of `partials` of a hop.
#[derive(Default)]
struct Plan {
    pairs: Vec<Pair>,
    /// Rows of `partials` that each token adds, in router order, `[A, partials]`.
    slots: Vec<u32>,
    /// Partials from elsewhere.
    uploaded: Vec<f32>,
    first_uploaded: u32,
    first_served: u32,
    served: usize,
    first_shared: u32,
}

impl Stepper<'_> {
    /// Puts what was picked through the device.
    pub(crate) fn hop(&mut self, picked: &Picked) -> Result<Hopped, EngineError> {
        let (layers, stage) = (self.spec().layers, picked.stage);
        let tokens: Vec<&Token> = picked.tokens().collect();
        let row = |t: &&Token| Row { main: t.main, ..Row::new(t.sequence, t.position, t.edition) };
        let rows: Vec<Row> = tokens.iter().map(row).collect();
        let ends = stage == layers;
        self.decoder.reserve(picked.rows(), if ends { rows.len() } else { 1 })?;
        let plan = self.load(picked, &tokens)?;
        let arrived = if stage < layers && !rows.is_empty() { self.take_arrived(stage)? } else { 0 };
        let lists = self.lists(picked, &plan);

        let (count, top_k) = (rows.len(), self.spec().top_k);
        let replicated = rows.first().is_some_and(|row| self.is_replicated(row));
        let spreads = self.spreads() && !replicated;
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        let heads = if ends { self.head_rows(&mut r, &rows)? } else { Vec::new() };
        let wants_logits = !heads.is_empty() && self.reads_logits(&rows)?;
        let blocks = match stage < layers && !rows.is_empty() {
            true => self.write_contexts(&mut r, &rows)?,
            false => 1,
        };
        match stage.checked_sub(1) {
            None => decoder.embed(&mut r, count, false),
            Some(layer) => {
                decoder.norm_ffn(&mut r, layer, 0, picked.rows());
                let (experts, every) = &lists;
                experts.batch.into_iter().for_each(|b| decoder.ffn(&mut r, layer, LocalFfn::Experts, b));
                every.batch.into_iter().for_each(|b| decoder.ffn(&mut r, layer, LocalFfn::Every, b));
                decoder.combine(&mut r, layer, count);
            }
        }
        let moe = if count > 0 && stage < layers { decoder.spec.moe_index(stage) } else { None };
        let attends = count > 0 && stage < layers;
        if attends {
            decoder.append_arrived(&mut r, stage, arrived);
            decoder.attend(&mut r, stage, count, blocks);
            if let Some(index) = moe {
                decoder.route(&mut r, stage, count);
                r.read::<u32>(&decoder.scratch.chosen[index], 0, count * top_k);
                r.read::<f32>(&decoder.scratch.weights[index], 0, count * top_k);
            }
            r.read::<f32>(decoder.scratch.x(), 0, count * 4 * decoder.spec.h4());
            if spreads {
                read_context(decoder, &mut r, count);
            }
        }
        if !heads.is_empty() {
            decoder.head(&mut r, heads.len(), count);
            r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        }
        let logits = if wants_logits { decoder.read_logits(&mut r, heads.len()) } else { 0 };
        let stride = 4 * decoder.spec.h4();
        if plan.served > 0 {
            let offset = u64::from(plan.first_served) * stride as u64 * 4;
            r.read::<f32>(&decoder.scratch.partials, offset, plan.served * stride);
        }
        let mut parts = r.submit()?.fetch()?.into_iter();
        let mut next = |wanted: bool| if wanted { parts.next() } else { None };
        let (chosen, weights) = (words(next(moe.is_some())), floats(next(moe.is_some())));
        let residual = floats(next(attends));
        let context = floats(next(attends && spreads));
        let sampled = words(next(!heads.is_empty()));
        let logits = rows_of(&mut parts, logits);
        let served = if plan.served > 0 { floats(parts.next()) } else { Vec::new() };

        for row in rows.iter().filter(|_| attends) {
            self.coherence.note(stage as u16, row.sequence, row.position);
        }
        self.stats.pairs += plan.pairs.len() as u64;
        let mut outcome = match heads.is_empty() {
            true => Outcome::default(),
            false => self.sampled(&rows, &heads, &sampled, &logits)?,
        };
        if let Some(index) = moe
            && self.captures_routes(&rows)?
        {
            self.capture_routes(&mut outcome.captured, index, &rows, &chosen, &weights)?;
        }
        let routed = Routed { chosen, weights, residual, context, routes: Vec::new() };
        Ok(Hopped { rows, routed, served, outcome })
    }

    /// Uploads what the tokens bring: ids before the first layer, else residual streams and partials from elsewhere.
    fn load(&self, picked: &Picked, tokens: &[&Token]) -> Result<Plan, EngineError> {
        let s = &self.decoder.scratch;
        let gpu = &self.decoder.gpu;
        let Some(layer) = picked.stage.checked_sub(1) else {
            let ids: Vec<[u32; 2]> = tokens.iter().map(|t| [t.id, t.position]).collect();
            gpu.write(&s.tokens, 0, &ids);
            return Ok(Plan::default());
        };
        let stride = 4 * self.spec().h4();
        let served = picked.serves.iter().map(|serve| &serve.frame.residual);
        let mut residual = Vec::with_capacity(picked.rows() * stride);
        for values in tokens.iter().map(|t| &t.residual).chain(served) {
            residual.extend_from_slice(values);
            residual.resize(residual.len().next_multiple_of(stride), 0.0);
        }
        gpu.write(s.x(), 0, &residual);
        let plan = match self.spec().moe_index(layer) {
            Some(_) => self.plan_hop(layer, picked, tokens)?,
            None => Plan { slots: (0..tokens.len() as u32).collect(), ..Plan::default() },
        };
        let offset = u64::from(plan.first_uploaded) * stride as u64 * 4;
        if offset + 4 * plan.uploaded.len() as u64 > s.partials.bytes() {
            let what = format!("layer {layer}: {} partials came, too many", plan.uploaded.len() / stride);
            return Err(EngineError::Internal(what));
        }
        gpu.write(&s.partials, offset, &plan.uploaded);
        Ok(plan)
    }

    /// Gives every choice a local expert and every partial a row: those of the tokens first, then those of serves,
    /// those that came from elsewhere, those of the shared expert.
    fn plan_hop(&self, layer: usize, picked: &Picked, tokens: &[&Token]) -> Result<Plan, EngineError> {
        let (top_k, stride) = (self.spec().top_k, 4 * self.spec().h4());
        let (shared, me) = (self.spec().shared.is_some(), self.me());
        let mut plan = Plan::default();
        let pair = |row: usize, slot: usize, choice: &Choice| {
            let expert = self.decoder.local_expert(layer, usize::from(choice.expert)).ok_or_else(|| {
                let expert = choice.expert;
                EngineError::Internal(format!("layer {layer}: expert {expert} is not on rank {me}"))
            })?;
            Ok::<_, EngineError>(Pair { row: row as u32, slot: slot as u32, weight: choice.weight, expert })
        };
        let served = picked.serves.iter().map(|serve| serve.frame.choices.len()).sum::<usize>();
        let own = tokens.iter().map(|t| t.choices.len()).sum::<usize>();
        let came = tokens.iter().map(|t| t.partials.len()).sum::<usize>();
        (plan.first_served, plan.served) = (own as u32, served);
        plan.first_uploaded = (own + served) as u32;
        plan.first_shared = (own + served + came) as u32;
        for (t, token) in tokens.iter().enumerate() {
            let mut slots = vec![NO_SLOT; top_k];
            for choice in &token.choices {
                slots[usize::from(choice.k) % top_k] = plan.pairs.len() as u32;
                plan.pairs.push(pair(t, plan.pairs.len(), choice)?);
            }
            for (k, values) in &token.partials {
                let at = plan.first_uploaded as usize + plan.uploaded.len() / stride;
                slots[usize::from(*k) % top_k] = at as u32;
                plan.uploaded.extend_from_slice(values);
                plan.uploaded.resize(plan.uploaded.len().next_multiple_of(stride), 0.0);
            }
            plan.slots.extend(slots);
            plan.slots.extend(shared.then_some(plan.first_shared + t as u32));
        }
        for (i, serve) in picked.serves.iter().enumerate() {
            for choice in &serve.frame.choices {
                plan.pairs.push(pair(tokens.len() + i, plan.pairs.len(), choice)?);
            }
        }
        Ok(plan)
    }

    /// Uploads the lists of the FFN: of experts, and of the FFN that every token takes.
    fn lists(&self, picked: &Picked, plan: &Plan) -> (PairList, PairList) {
        let Some(layer) = picked.stage.checked_sub(1) else {
            return (PairList::default(), PairList::default());
        };
        let (gpu, s) = (&self.decoder.gpu, &self.decoder.scratch);
        let identity: Vec<u32> = (0..picked.tokens().count() as u32).collect();
        gpu.hold(&s.source, &identity);
        let moe = self.spec().moe_index(layer).is_some();
        gpu.hold(if moe { &s.slots } else { &s.dense_slots }, &plan.slots);
        let experts = PairList::new(plan.pairs.clone(), (0, 0), self.decoder.expert_cut());
        let every = match !moe || self.spec().shared.is_some() {
            true => {
                let first = if moe { plan.first_shared } else { 0 };
                PairList::every(
                    &identity,
                    first,
                    (experts.pairs.len(), experts.tiles.len()),
                    self.decoder.cut(),
                )
            }
            false => PairList::default(),
        };
        for list in [&experts, &every] {
            if let Some(batch) = &list.batch {
                gpu.write(&s.pairs_list, 16 * batch.first_pair as u64, &list.pairs);
                gpu.write(&s.tiles, 16 * batch.first_tile as u64, &list.tiles);
            }
        }
        (experts, every)
    }
}

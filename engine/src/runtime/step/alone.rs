//! A step of one rank: one submission from embedding to sampled ids. While the device works on it the step behind it may be submitted
//! already: all that is unknown of that are the ids that this one samples, and they are on the device.

use super::super::experts::PairList;
use super::{Outcome, Row, Stepper, floats, rows_of, words};
use crate::EngineError;
use crate::gpu::Pending;
use crate::model::decoder::{ExpertBatch, LocalFfn};

/// A step that was submitted.
pub(crate) struct Submitted {
    rows: Vec<Row>,
    /// Which of them the head was asked for.
    heads: Vec<u32>,
    /// In how many read-backs their logits come, if at all.
    logits: usize,
    /// Whether every row's routes are read back.
    routes: bool,
    pending: Pending,
}

impl Submitted {
    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }
}

impl Stepper<'_> {
    /// Submits a step whose rows were uploaded ([`Stepper::begin`]); only the sampled ids (and what is captured) are read back.
    pub(crate) fn submit_alone(&mut self, rows: Vec<Row>) -> Result<Submitted, EngineError> {
        self.submit(rows, false)
    }

    /// Submits the step behind the one that was submitted last, before it is known what that samples. `None` where more of it is
    /// unknown than ids that stay on the device.
    pub(crate) fn submit_next(&mut self, last: &Submitted) -> Result<Option<Submitted>, EngineError> {
        let all_sampled = last.heads.len() == last.rows.len() && last.logits == 0 && !last.routes;
        if !all_sampled || !last.rows.iter().all(|row| self.sequences.goes_on(row.sequence, row.position)) {
            return Ok(None);
        }
        let next = |row: &Row| {
            let position = row.position + 1;
            Ok(Row::new(row.sequence, position, self.sequence(row.sequence)?.edition_at(position)))
        };
        let rows: Vec<Row> = last.rows.iter().map(next).collect::<Result<_, EngineError>>()?;
        // Ids in their place are not looked at.
        let positions: Vec<[u32; 2]> = rows.iter().map(|row| [0, row.position]).collect();
        self.decoder.gpu.write(&self.decoder.scratch.tokens, 0, &positions);
        self.submit(rows, true).map(Some)
    }

    fn submit(&mut self, rows: Vec<Row>, follows: bool) -> Result<Submitted, EngineError> {
        let (layers, moe, top_k) = (self.spec().layers, self.spec().moe_layers(), self.spec().top_k);
        let blocks = self.write_contexts(&rows)?;
        let count = rows.len();
        let (shared, dense) = self.write_identity(count);
        let heads = self.head_rows(&rows)?;
        let routes = self.captures_routes(&rows)?;

        let decoder = &*self.decoder;
        let mut r = decoder.record();
        decoder.embed(&mut r, count, follows);
        for layer in 0..layers {
            decoder.attend(&mut r, layer, count, blocks);
            if decoder.spec.moe_index(layer).is_some() {
                decoder.route(&mut r, layer, count);
                decoder.all_experts(&mut r, layer, count);
                shared.into_iter().for_each(|batch| decoder.ffn(&mut r, layer, LocalFfn::Every, batch));
            } else {
                decoder.norm_ffn(&mut r, layer, 0, count);
                dense.into_iter().for_each(|batch| decoder.ffn(&mut r, layer, LocalFfn::Every, batch));
            }
            decoder.combine(&mut r, layer, count);
        }
        // A chunk within a prompt asks the head for nothing.
        let asked = !heads.is_empty();
        let wants_logits = asked && self.reads_logits(&rows)?;
        if asked {
            decoder.head(&mut r, heads.len(), count);
            r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        }
        let logits = if wants_logits { decoder.read_logits(&mut r, heads.len()) } else { 0 };
        for index in (0..moe).filter(|_| routes) {
            r.read::<u32>(&decoder.scratch.chosen[index], 0, count * top_k);
            r.read::<f32>(&decoder.scratch.weights[index], 0, count * top_k);
        }
        let pending = r.submit()?.later();
        self.stats.pairs += (count * top_k * moe) as u64;
        Ok(Submitted { rows, heads, logits, routes, pending })
    }

    /// Waits for a step and takes what it sampled of the rows that are `wanted`: sequences of others may have ended since.
    pub(crate) fn finish_alone(&mut self, step: Submitted, wanted: &[Row]) -> Result<Outcome, EngineError> {
        let Submitted { rows, heads, logits, routes, pending } = step;
        let mut parts = pending.fetch(&self.decoder.gpu)?.into_iter();
        let sampled = if heads.is_empty() { Vec::new() } else { words(parts.next()) };
        let logits = rows_of(&mut parts, logits);
        let of_wanted = |&(&head, _): &(&u32, &u32)| wanted.contains(&rows[head as usize]);
        let (heads, sampled): (Vec<u32>, Vec<u32>) = heads.iter().zip(&sampled).filter(of_wanted).unzip();
        let mut outcome = self.sampled(&rows, &heads, &sampled, &logits)?;
        for index in (0..self.spec().moe_layers()).filter(|_| routes) {
            let (chosen, weights) = (words(parts.next()), floats(parts.next()));
            self.capture_routes(&mut outcome.captured, index, &rows, &chosen, &weights)?;
        }
        Ok(outcome)
    }

    /// Writes the lists of a step in which every row stays where it is: row i's residual is row i, its partials
    /// those of its pairs, then the shared expert's or the dense FFN's. Returns the batches of the last two.
    fn write_identity(&mut self, count: usize) -> (Option<ExpertBatch>, Option<ExpertBatch>) {
        let (gpu, s, spec) = (&self.decoder.gpu, &self.decoder.scratch, &self.decoder.spec);
        let pairs = count * spec.top_k;
        let rows: Vec<u32> = (0..count as u32).collect();
        let every: Vec<u32> = (0..count).map(|t| (pairs + t) as u32).collect();
        let of_row = |t: usize| {
            let own = (t * spec.top_k..(t + 1) * spec.top_k).map(|slot| slot as u32);
            own.chain(spec.shared.map(|_| every[t]))
        };
        gpu.hold(&s.source, &rows);
        gpu.hold(&s.slots, &(0..count).flat_map(of_row).collect::<Vec<_>>());
        gpu.hold(&s.dense_slots, &every);
        // A gate writes the shared expert's weights into its list, so that dense layers have one of their own.
        let upload = |wanted: bool, before: usize| {
            let list = if wanted {
                PairList::every(&rows, pairs as u32, (before, before), self.decoder.cut())
            } else {
                PairList::default()
            };
            gpu.write(&s.pairs_list, 16 * before as u64, &list.pairs);
            gpu.write(&s.tiles, 16 * before as u64, &list.tiles);
            list.batch
        };
        (upload(spec.shared.is_some(), pairs), upload(spec.dense.is_some(), pairs + count))
    }
}

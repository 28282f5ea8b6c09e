//! Steps of one rank: submissions from embedding to sampled ids. While the device works on some, those behind them may be submitted
//! already, several of them as one: all that is unknown of them are the ids that the ones before sample, and they are on the device.

use super::super::experts::PairList;
use super::{Batch, Outcome, Row, Stepper, floats, rows_of, words};
use crate::EngineError;
use crate::gpu::{Pending, Recording};
use crate::model::decoder::{ExpertBatch, LocalFfn};
use std::collections::VecDeque;
use std::time::Instant;

/// Steps that were submitted and have still to be taken, oldest first.
#[derive(Default)]
pub(crate) struct Submitted {
    steps: VecDeque<Step>,
    /// What was read back of those whose submission has ended.
    read: VecDeque<Vec<u8>>,
    /// Something was submitted since: what the last of them samples is no longer where a next one would look for it.
    overtaken: bool,
    /// When the last submission ended, and seconds that each of its steps took.
    ended: Option<Instant>,
    step_seconds: Option<f64>,
}

struct Step {
    rows: Vec<Row>,
    /// Which of them the head was asked for.
    heads: Vec<u32>,
    /// In how many read-backs their logits come, if at all.
    logits: usize,
    /// Whether every row's routes are read back.
    routes: bool,
    /// The first of those that were submitted together: they, how many they are, and since when.
    submission: Option<(Pending, usize, Instant)>,
}

impl Submitted {
    /// The rows of the next step.
    pub(crate) fn next(&self) -> Option<&[Row]> {
        self.steps.front().map(|step| step.rows.as_slice())
    }

    /// Seconds of the device that a step takes; `None`: none was taken yet.
    pub(crate) fn step_seconds(&self) -> Option<f64> {
        self.step_seconds
    }

    /// Whether others may be submitted behind these, which are on one submission.
    pub(crate) fn may_go_on(&self) -> bool {
        !self.overtaken && self.steps.iter().skip(1).all(|step| step.submission.is_none())
    }

    /// Notes that something else was submitted.
    pub(crate) fn overtake(&mut self) {
        self.overtaken = true;
    }

    /// Forgets them: nobody wants what they sample.
    pub(crate) fn clear(&mut self) {
        (self.steps, self.read, self.overtaken) = Default::default();
    }

    fn add(&mut self, steps: Vec<Step>, pending: Pending) {
        let count = steps.len();
        let first = self.steps.len();
        self.steps.extend(steps);
        self.steps[first].submission = Some((pending, count, Instant::now()));
    }
}

impl Stepper<'_> {
    /// Submits a step by itself; only the sampled ids (and what is captured) are read back.
    pub(crate) fn submit_alone(&mut self, batch: &Batch, to: &mut Submitted) -> Result<(), EngineError> {
        let rows = self.begin(batch)?;
        let mut r = self.decoder.record();
        let step = self.record_step(&mut r, rows, false)?;
        to.overtaken = false;
        to.add(vec![step], r.submit()?.later());
        Ok(())
    }

    /// Submits `most` steps behind those, as one, before it is known what they sample; fewer where more is unknown of a step than ids
    /// that stay on the device.
    pub(crate) fn submit_next(&mut self, to: &mut Submitted, most: usize) -> Result<(), EngineError> {
        // Nothing is recorded where nothing follows: what was encoded ahead waits for the next step by itself.
        let mut following = self.following(to.steps.back())?;
        if following.is_none() {
            return Ok(());
        }
        let mut r = self.decoder.record();
        let mut steps: Vec<Step> = Vec::with_capacity(most);
        while let Some(rows) = following.take() {
            // Ids in their place are not looked at.
            let positions: Vec<[u32; 2]> = rows.iter().map(|row| [0, row.position]).collect();
            r.write(&self.decoder.scratch.tokens, 0, &positions);
            steps.push(self.record_step(&mut r, rows, true)?);
            if steps.len() < most {
                following = self.following(steps.last())?;
            }
        }
        to.add(steps, r.submit()?.later());
        Ok(())
    }

    /// The rows of the step behind one, where all that is unknown of them are ids that it leaves on the device.
    fn following(&self, last: Option<&Step>) -> Result<Option<Vec<Row>>, EngineError> {
        let goes_on = |row: &Row| self.sequences.goes_on(row.sequence, row.position);
        let all_sampled = |of: &&Step| of.heads.len() == of.rows.len() && of.logits == 0 && !of.routes;
        let Some(last) = last.filter(all_sampled).filter(|of| of.rows.iter().all(goes_on)) else {
            return Ok(None);
        };
        let next = |row: &Row| {
            let position = row.position + 1;
            Ok(Row::new(row.sequence, position, self.sequence(row.sequence)?.edition_at(position)))
        };
        last.rows.iter().map(next).collect::<Result<_, EngineError>>().map(Some)
    }

    /// Records a step whose tokens were uploaded, or are the ones that the step before it samples.
    fn record_step(&self, r: &mut Recording<'_>, rows: Vec<Row>, follows: bool) -> Result<Step, EngineError> {
        let (layers, moe, top_k) = (self.spec().layers, self.spec().moe_layers(), self.spec().top_k);
        let blocks = self.write_contexts(r, &rows)?;
        let count = rows.len();
        let (shared, dense) = self.write_identity(r, count);
        let heads = self.head_rows(r, &rows)?;
        let routes = self.captures_routes(&rows)?;

        let decoder = &*self.decoder;
        decoder.embed(r, count, follows);
        for layer in 0..layers {
            decoder.attend(r, layer, count, blocks);
            if decoder.spec.moe_index(layer).is_some() {
                decoder.route(r, layer, count);
                decoder.all_experts(r, layer, count);
                shared.into_iter().for_each(|batch| decoder.ffn(r, layer, LocalFfn::Every, batch));
            } else {
                decoder.norm_ffn(r, layer, 0, count);
                dense.into_iter().for_each(|batch| decoder.ffn(r, layer, LocalFfn::Every, batch));
            }
            decoder.combine(r, layer, count);
        }
        // A chunk within a prompt asks the head for nothing.
        let asked = !heads.is_empty();
        let wants_logits = asked && self.reads_logits(&rows)?;
        if asked {
            decoder.head(r, heads.len(), count);
            r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        }
        let logits = if wants_logits { decoder.read_logits(r, heads.len()) } else { 0 };
        for index in (0..moe).filter(|_| routes) {
            r.read::<u32>(&decoder.scratch.chosen[index], 0, count * top_k);
            r.read::<f32>(&decoder.scratch.weights[index], 0, count * top_k);
        }
        Ok(Step { rows, heads, logits, routes, submission: None })
    }

    /// Waits for the oldest step and takes what it sampled of the rows that are `wanted`: sequences of others may have ended since.
    pub(crate) fn finish_alone(
        &mut self,
        submitted: &mut Submitted,
        wanted: &[Row],
    ) -> Result<Outcome, EngineError> {
        let Some(Step { rows, heads, logits, routes, submission }) = submitted.steps.pop_front() else {
            return Ok(Outcome::default());
        };
        let joins = submission.is_none();
        if let Some((pending, steps, since)) = submission {
            submitted.read = pending.fetch(&self.decoder.gpu)?.into();
            let (now, before) = (Instant::now(), submitted.ended);
            let began = before.map_or(since, |before| before.max(since));
            submitted.ended = Some(now);
            submitted.step_seconds = Some((now - began).as_secs_f64() / steps as f64);
        }
        let mut parts = std::iter::from_fn(|| submitted.read.pop_front());
        let sampled = if heads.is_empty() { Vec::new() } else { words(parts.next()) };
        let logits = rows_of(&mut parts, logits);
        let is_wanted = |row: &Row| wanted.contains(row);
        let of_wanted = |&(&head, _): &(&u32, &u32)| is_wanted(&rows[head as usize]);
        let (heads, sampled): (Vec<u32>, Vec<u32>) = heads.iter().zip(&sampled).filter(of_wanted).unzip();
        let mut outcome = self.sampled(&rows, &heads, &sampled, &logits)?;
        let (moe, top_k) = (self.spec().moe_layers(), self.spec().top_k);
        for index in (0..moe).filter(|_| routes) {
            let (chosen, weights) = (words(parts.next()), floats(parts.next()));
            self.capture_routes(&mut outcome.captured, index, &rows, &chosen, &weights)?;
        }
        self.stats.joined_steps += u64::from(joins);
        let worked = rows.iter().filter(|row| is_wanted(row)).count();
        self.stats.pairs += (worked * top_k * moe) as u64;
        Ok(outcome)
    }

    /// Writes the lists of a step in which every row stays where it is: row i's residual is row i, its partials
    /// those of its pairs, then the shared expert's or the dense FFN's. Returns the batches of the last two.
    fn write_identity(
        &self,
        r: &mut Recording<'_>,
        count: usize,
    ) -> (Option<ExpertBatch>, Option<ExpertBatch>) {
        let (s, spec) = (&self.decoder.scratch, &self.decoder.spec);
        let pairs = count * spec.top_k;
        let rows: Vec<u32> = (0..count as u32).collect();
        let every: Vec<u32> = (0..count).map(|t| (pairs + t) as u32).collect();
        let of_row = |t: usize| {
            let own = (t * spec.top_k..(t + 1) * spec.top_k).map(|slot| slot as u32);
            own.chain(spec.shared.map(|_| every[t]))
        };
        r.hold(&s.source, &rows);
        r.hold(&s.slots, &(0..count).flat_map(of_row).collect::<Vec<_>>());
        r.hold(&s.dense_slots, &every);
        // A gate writes the shared expert's weights into its list, so that dense layers have one of their own.
        let mut upload = |wanted: bool, before: usize| {
            let list = if wanted {
                PairList::every(&rows, pairs as u32, (before, before), self.decoder.cut())
            } else {
                PairList::default()
            };
            r.write(&s.pairs_list, 16 * before as u64, &list.pairs);
            r.write(&s.tiles, 16 * before as u64, &list.tiles);
            list.batch
        };
        (upload(spec.shared.is_some(), pairs), upload(spec.dense.is_some(), pairs + count))
    }
}

//! The end of a step: which rows the head is asked for, what it sampled, and what is captured on the way.

use super::super::sequence::Sampled;
use super::super::worker::Captured;
use super::{Outcome, Row, Stepper, rows_of, words};
use crate::EngineError;
use crate::gpu::Recording;
use crate::sampling::{Logprobs, Sampling};
use exflow_shaders::params::Draw;

impl Stepper<'_> {
    /// Head and choice for the rows that end a prompt or are decoded.
    pub(crate) fn sample(&mut self, rows: &[Row]) -> Result<Outcome, EngineError> {
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        let heads = self.head_rows(&mut r, rows)?;
        if heads.is_empty() {
            return Ok(Outcome::default());
        }
        let wants_logits = self.reads_logits(rows)?;
        decoder.head(&mut r, heads.len(), rows.len());
        r.read::<u32>(&decoder.scratch.sampled, 0, heads.len());
        let read = if wants_logits { decoder.read_logits(&mut r, heads.len()) } else { 0 };
        let mut parts = r.submit()?.fetch()?.into_iter();
        let sampled = words(parts.next());
        let logits = rows_of(&mut parts, read);
        self.sampled(rows, &heads, &sampled, &logits)
    }

    /// Uploads which rows the head is asked for, each sequence's last or all where logits are captured, and how their
    /// tokens are drawn.
    pub(super) fn head_rows(&self, r: &mut Recording<'_>, rows: &[Row]) -> Result<Vec<u32>, EngineError> {
        let (mut heads, mut draws) = (Vec::new(), Vec::new());
        for (t, row) in rows.iter().enumerate().filter(|(_, row)| !self.is_copy(row)) {
            let sequence = self.sequence(row.sequence)?;
            let is_last = row.position as usize + 1 >= sequence.start.prompt.len();
            if is_last || sequence.start.capture_logits {
                heads.push(t as u32);
                let sampling = &sequence.start.sampling;
                let drawn = is_last && self.on_device(sampling);
                draws.push(if drawn { sampling.draw(row.position + 1) } else { Draw::default() });
            }
        }
        let s = &self.decoder.scratch;
        r.hold(&s.head_rows, &heads);
        s.has_draws.set(draws.iter().any(|draw| draw.scale > 0.0));
        if s.has_draws.get() {
            r.write(&s.draws, 0, &draws);
        }
        Ok(heads)
    }

    /// Whether the device chooses a token by itself.
    fn on_device(&self, sampling: &Sampling) -> bool {
        sampling.on_device() && (sampling.temperature == 0.0 || self.decoder.gpu.draws())
    }

    pub(super) fn sampled(
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
                let (start, position) = (&sequence.start, row.position + 1);
                let of_row = || &logits[i * stride..][..self.spec().vocab_size];
                let token = match self.on_device(&start.sampling) {
                    true => token,
                    false => {
                        let before = start.prompt.iter().chain(&sequence.output).copied();
                        start.sampling.choose(of_row(), before, position)
                    }
                };
                let logprobs = start.logprobs.map(|top| Logprobs::of(of_row(), token, usize::from(top)));
                let (sequence, edition) = (row.sequence, row.edition);
                outcome.sampled.push(Sampled { sequence, token, logprobs, edition });
            }
            if sequence.start.capture_logits {
                let values = logits[i * stride..][..self.spec().vocab_size].to_vec();
                outcome.captured.push(Captured::Logits { position: row.position, values });
            }
        }
        Ok(outcome)
    }

    pub(super) fn captures_routes(&self, rows: &[Row]) -> Result<bool, EngineError> {
        Ok(rows
            .iter()
            .any(|row| self.sequences.running.get(&row.sequence).is_some_and(|s| s.start.capture_routes)))
    }

    pub(super) fn reads_logits(&self, rows: &[Row]) -> Result<bool, EngineError> {
        Ok(rows.iter().any(|row| {
            self.sequences.running.get(&row.sequence).is_some_and(|s| {
                s.start.capture_logits || s.start.logprobs.is_some() || !self.on_device(&s.start.sampling)
            })
        }))
    }

    pub(super) fn capture_routes(
        &self,
        captured: &mut Vec<Captured>,
        layer: usize,
        rows: &[Row],
        chosen: &[u32],
        weights: &[f32],
    ) -> Result<(), EngineError> {
        let top_k = self.spec().top_k;
        for (t, row) in rows.iter().enumerate().filter(|(_, row)| !self.is_copy(row)) {
            let start = &self.sequence(row.sequence)?.start;
            if start.capture_routes {
                captured.push(Captured::Route {
                    rank: self.me(),
                    request: start.request,
                    position: row.position,
                    layer: layer as u16,
                    experts: chosen[t * top_k..][..top_k].to_vec(),
                    weights: weights[t * top_k..][..top_k].to_vec(),
                });
            }
        }
        Ok(())
    }
}

//! Whether matrix units make products of matrices with scales in less time than bytes do.

use super::{GAIN, PASSES, Probe};
use crate::EngineError;
use crate::gpu::{Cut, EXPERT_ROWS, FormTuning, LINEAR_ROWS};

impl Probe<'_> {
    /// Whether they do, as the mean over all numbers of rows has it: a row has to have the same bits in a batch of any size, so
    /// that either all products are made there or none.
    pub(super) fn units_gain(&self, lanes: &FormTuning) -> Result<bool, EngineError> {
        let way = self.way(lanes.textures, lanes.subgroups)?;
        let on_lanes = Cut::tuned(self.form, self.gpu.is_cpu(), lanes);
        let on_units = on_lanes.on(self.gpu.units());
        let mut times = Vec::new();
        for rows in LINEAR_ROWS {
            times.push(in_turn(|of| self.linear(&way, [on_lanes, on_units][of].linear(rows), rows))?);
        }
        for rows in EXPERT_ROWS {
            times.push(in_turn(|of| self.experts(&way, [on_lanes, on_units][of].each(rows), rows))?);
        }
        Ok(gain(&times) < GAIN)
    }
}

/// The least seconds of two ways, measured in turn.
fn in_turn(time: impl Fn(usize) -> Result<f64, EngineError>) -> Result<[f64; 2], EngineError> {
    let mut least = [f64::INFINITY; 2];
    for of in (0..PASSES).flat_map(|_| 0..2) {
        least[of] = least[of].min(time(of)?);
    }
    Ok(least)
}

/// The geometric mean of what the second of two times is of the first.
fn gain(times: &[[f64; 2]]) -> f64 {
    let logs: f64 = times.iter().map(|[first, second]| (second / first).ln()).sum();
    (logs / times.len().max(1) as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_rows_have_to_gain_what_few_lose() {
        assert!(gain(&[[1.0, 2.0], [1.0, 0.2]]) < GAIN);
        assert!(gain(&[[1.0, 2.0], [1.0, 0.6]]) > 1.0);
        assert!(gain(&[[1.0, 0.95], [2.0, 1.9]]) > GAIN, "that is noise");
    }

    #[test]
    fn two_ways_are_measured_in_turn() {
        let calls = std::cell::RefCell::new(Vec::new());
        let times = in_turn(|of| {
            calls.borrow_mut().push(of);
            Ok(10.0 * of as f64 + calls.borrow().len() as f64)
        });
        assert_eq!(times.expect("no error"), [1.0, 12.0]);
        assert_eq!(calls.into_inner(), [0, 1].repeat(PASSES));
    }
}

//! Lower bounds: no placement within the capacity costs less.

mod chordal;
mod levels;
mod polyhedron;
mod rearrange;
mod spectral;

use crate::cost::Problem;
use chordal::Chordal;
use levels::levels;

/// Bounds of one problem, refined step by step.
pub(crate) struct Prover {
    at_once: f64,
    load: f64,
    levels: Vec<Chordal>,
}

impl Prover {
    /// The bound at once, and the relaxations to refine where a step of all takes less than about `longest` seconds;
    /// `holders` is a good placement to begin from.
    pub(crate) fn new(problem: &Problem, holders: &[u16], longest: f64) -> Self {
        let mut levels = levels(problem);
        if levels.iter().map(|level| chordal::step_seconds(problem, level)).sum::<f64>() > longest {
            levels.clear();
        }
        let levels = levels.iter().map(|level| Chordal::new(problem, level, holders)).collect();
        Self { at_once: rearrange::rearrangement(problem), load: problem.load.lower_bound(problem), levels }
    }

    /// The best bound so far on the whole objective.
    pub(crate) fn bound(&self) -> f64 {
        self.at_once.max(self.levels.iter().map(Chordal::bound).sum()) + self.load
    }

    /// One more step of the level that has had fewest.
    pub(crate) fn step(&mut self, stop: &dyn Fn() -> bool) {
        if let Some(level) = self.levels.iter_mut().min_by_key(|level| level.steps()) {
            level.step(stop);
        }
    }

    /// Whether steps can still help.
    pub(crate) fn can_step(&self) -> bool {
        !self.levels.is_empty()
    }
}

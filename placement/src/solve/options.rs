//! What a solve is told, what it reports, and why it refuses.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::affinity::AffinityError;
use crate::capacity::{Balance, CapacityError, Memory};
use crate::clock::{Clock, StdClock};
use crate::cost::Weights;
use crate::table::TableError;
use crate::topology::TopologyError;

/// How to solve.
#[derive(Clone)]
pub struct SolveOptions {
    /// Seed of all randomness.
    pub seed: u64,
    /// When to stop searching and proving.
    pub time_limit: Duration,
    /// Threads that search and prove; 0 counts as 1.
    pub threads: usize,
    /// Weights of the objective.
    pub weights: Weights,
    /// What is spread evenly.
    pub balance: Balance,
    /// Most tokens that a rank serves in a layer, over what round-robin's busiest rank serves there; `None`: no bound.
    /// With [`Balance::Total`] over all layers together, and 1.15 where nothing is said.
    pub load_bound: Option<f64>,
    /// Whether slots that are left over take copies.
    pub replicas: bool,
    /// Sizes, for ranks that name their memory.
    pub memory: Memory,
    /// Whether to solve exactly where there are few states; else search and bound alone.
    pub exact: bool,
    /// Stop after this many rounds of the search: for results that do not depend on the clock.
    pub max_rounds: Option<u64>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
}

impl Default for SolveOptions {
    /// Seed 0, ten seconds, one thread, ExFlow's objective with the wrap, the system's clock.
    fn default() -> Self {
        Self {
            seed: 0,
            time_limit: Duration::from_secs(10),
            threads: 1,
            weights: Weights::default(),
            balance: Balance::default(),
            load_bound: None,
            replicas: true,
            memory: Memory::default(),
            exact: true,
            max_rounds: None,
            clock: Arc::new(StdClock::start()),
        }
    }
}

impl fmt::Debug for SolveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SolveOptions")
            .field("seed", &self.seed)
            .field("time_limit", &self.time_limit)
            .field("threads", &self.threads)
            .field("weights", &self.weights)
            .field("balance", &self.balance)
            .finish_non_exhaustive()
    }
}

impl SolveOptions {
    /// Whether every weight is a number of 0 or more, and the load's bound can be met.
    pub(crate) fn check(&self) -> Result<(), SolveError> {
        let Weights { transitions, wrap, coactivation, load } = self.weights;
        let all =
            [("transitions", transitions), ("wrap", wrap), ("coactivation", coactivation), ("load", load)];
        if let Some(&(term, weight)) = all.iter().find(|(_, w)| !(*w >= 0.0 && w.is_finite())) {
            return Err(SolveError::Weight { term, weight });
        }
        match self.load_bound {
            Some(factor) if !(factor >= 1.0 && factor.is_finite()) => Err(SolveError::LoadBound(factor)),
            _ => Ok(()),
        }
    }
}

/// How far a solve has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolveProgress {
    /// Time since the solve began.
    pub elapsed: Duration,
    /// Cost of the best placement so far.
    pub cost: f64,
    /// Best proven lower bound so far.
    pub lower_bound: f64,
    /// Rounds of the search so far.
    pub rounds: u64,
}

/// Why a placement cannot be solved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SolveError {
    /// The counts make no sense.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The topology makes no sense.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The ranks cannot hold the experts.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// The result is not a table (more than 65536 layers, experts or ranks).
    #[error(transparent)]
    Table(#[from] TableError),
    /// Experts of all layers, and what their layers take besides, do not fit.
    #[error(
        "the ranks' memory does not hold all experts with the attention weights and K/V of their layers: add ranks or memory, or shorten the context"
    )]
    NoRoom,
    /// A bound below round-robin's own load.
    #[error("load bound {0}: give a number of 1 or more, as a multiple of round-robin's busiest rank")]
    LoadBound(f64),
    /// A weight of the objective is negative or not a number.
    #[error("objective: the weight of {term} is {weight}; it must be a number of 0 or more")]
    Weight {
        /// The term.
        term: &'static str,
        /// Its weight.
        weight: f64,
    },
}

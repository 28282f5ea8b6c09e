//! The rows of a step on their way through the layers, in one part or in several that take turns: while the rows of one
//! travel, another computes. A part goes from exchange to exchange; all ranks let the parts go on in the same order.

use super::super::frames::{PartialFrame, RowFrame};
use super::super::worker::Captured;
use super::experts::Work;
use super::{Bulk, Routed, Row, Stepper};
use crate::EngineError;
use crate::options::Overlap;
use exflow_placement::Strategy;
use exflow_transport::RoundId;

/// Rows of a step that go through the layers together.
pub(crate) struct Part {
    pub(crate) rows: Vec<Row>,
    /// The layer that its rows are in, or before.
    pub(crate) layer: usize,
    /// Whether an exchange has ended on its way so far.
    pub(crate) exchanged: bool,
    away: Away,
}

/// What a part waits for, within a layer.
#[derive(Default)]
enum Away {
    #[default]
    Nothing,
    /// Rows of others.
    Rows(Box<Travelling>),
    /// Partials of others.
    Partials(Box<Travelling>),
}

/// A layer that is under way.
struct Travelling {
    round: RoundId,
    routed: Routed,
    work: Work,
    arrived: Vec<RowFrame>,
}

/// What the parts of a step have in common.
pub(crate) struct Passage {
    pub(crate) decode: bool,
    /// Whether there is one part alone.
    pub(crate) alone: bool,
    pub(crate) captured: Vec<Captured>,
    pub(crate) bulk: Bulk,
}

impl Passage {
    /// The context of a prompt is made in the step itself; a prompt is prefilled where it lives; its tokens become
    /// coherent when they decode.
    fn strategy(&self, of: Strategy) -> Strategy {
        if self.decode { of } else { Strategy::Vanilla }
    }
}

impl Part {
    pub(crate) fn new(rows: Vec<Row>) -> Self {
        Self { rows, layer: 0, exchanged: false, away: Away::Nothing }
    }

    /// The exchange that it waits for; none is to be waited for any more.
    pub(crate) fn give_up(&mut self) -> Option<RoundId> {
        match std::mem::take(&mut self.away) {
            Away::Nothing => None,
            Away::Rows(travelling) | Away::Partials(travelling) => Some(travelling.round),
        }
    }
}

impl Stepper<'_> {
    /// Enters a part's next layer: attention and router, and the dispatch begins. A layer without exchange is passed.
    pub(crate) fn enter(&mut self, part: &mut Part, passage: &mut Passage) -> Result<(), EngineError> {
        let layer = part.layer;
        if !matches!(part.away, Away::Nothing) || layer >= self.spec().layers {
            return Ok(());
        }
        let _span = tracing::debug_span!("layer", layer, rows = part.rows.len()).entered();
        // The context of a prompt is made in the step itself; a decoded token's may still be on its way.
        self.await_contexts(layer, if passage.decode { &part.rows } else { &[] })?;
        let routed = self.attend(layer, &part.rows, passage.strategy(self.strategy))?;
        let Some(index) = self.spec().moe_index(layer) else {
            self.gather_contexts(layer, &part.rows, &routed, &mut passage.bulk)?;
            self.run_dense(layer, part.rows.len())?;
            part.layer += 1;
            return Ok(());
        };
        if self.captures_routes(&part.rows)? {
            let captured = &mut passage.captured;
            self.capture_routes(captured, index, &part.rows, &routed.chosen, &routed.weights)?;
        }
        if passage.decode {
            self.count_stays(&part.rows, &routed);
        }
        if part.rows.first().is_some_and(|row| self.is_replicated(row)) {
            part.rows = self.replicated_experts(layer, &part.rows, &routed)?;
            (part.layer, part.exchanged) = (layer + 1, true);
            return Ok(());
        }
        let round = self.dispatch(layer, &part.rows, &routed, passage.decode)?;
        self.gather_contexts(layer, &part.rows, &routed, &mut passage.bulk)?;
        let mut work = Work::default();
        if self.overlap != Overlap::Off {
            self.run_own(layer, &part.rows, &routed, &mut work)?;
        }
        part.away = Away::Rows(Box::new(Travelling { round, routed, work, arrived: Vec::new() }));
        Ok(())
    }

    /// Waits for the exchange that a part is in, if any, and goes on to the layer's combine or out of the layer.
    pub(crate) fn go_on(&mut self, part: &mut Part, passage: &mut Passage) -> Result<(), EngineError> {
        let (layer, own) = (part.layer, part.rows.len());
        let (mut travelling, received) = match std::mem::take(&mut part.away) {
            Away::Nothing => return Ok(()),
            Away::Rows(mut t) => {
                if self.overlap == Overlap::Off {
                    t.arrived = self.arrive(t.round, layer, own)?;
                    self.run_own(layer, &part.rows, &t.routed, &mut t.work)?;
                    self.run_arrived(layer, &t.arrived, own, &mut t.work)?;
                } else {
                    t.arrived = self.run_as_they_come(t.round, (layer, passage.decode), own, &mut t.work)?;
                }
                part.exchanged = true;
                let received = match (self.combines(passage), passage.alone) {
                    (false, _) => Vec::new(),
                    (true, true) => self.exchange_partials(layer, &t.work, passage.decode)?,
                    (true, false) => {
                        t.round = self.start_combine(layer, &t.work, passage.decode)?;
                        part.away = Away::Partials(t);
                        return Ok(());
                    }
                };
                (t, received)
            }
            Away::Partials(t) => {
                let received: Vec<PartialFrame> = self.finish_combine(t.round)?;
                (t, received)
            }
        };
        let Travelling { routed, arrived, work, .. } = &mut *travelling;
        part.rows = self.settle(layer, &part.rows, routed, arrived, received, work)?;
        part.layer += 1;
        Ok(())
    }

    /// Whether layers have a second exchange.
    fn combines(&self, passage: &Passage) -> bool {
        let stays = passage.strategy(self.strategy) == Strategy::Coherent && self.groups.is_empty();
        !stays || self.spec().top_k > 1
    }
}

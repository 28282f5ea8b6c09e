//! Measuring a world that runs nothing, and changing how it runs, between requests.

use super::Cluster;
use crate::options::{NoProgress, PlacementSource, Schedule};
use crate::plan::Measurements;
use crate::runtime::{Command, Event, Measured};
use crate::{EngineError, Strategy};
use exflow_placement::{PlacementTable, Rank};
use std::time::Duration;

/// So often it is looked whether ranks were lost while they measure.
const LOOK: Duration = Duration::from_millis(500);

impl Cluster {
    /// Measures every link and every rank's kernels; takes a few seconds, in which nothing else runs.
    ///
    /// # Errors
    /// In flow, whose ranks cannot stop together; where a rank is lost on the way.
    pub fn measure(&mut self) -> Result<Measurements, EngineError> {
        if self.options.schedule == Schedule::Flow {
            return Err(EngineError::usage("ranks in flow cannot be measured", "start them in rounds"));
        }
        let epoch = self.epoch;
        self.command(Command::Measure)?;
        let mut measured: Vec<Option<Measured>> = (0..self.options.ranks).map(|_| None).collect();
        for absent in &self.absent {
            measured[absent.index()] = Some(Measured::default());
        }
        while measured.iter().any(Option::is_none) {
            if let Some(Event::Measured(rank, of_rank)) = self.event_within(LOOK)? {
                measured[rank.index()] = Some(*of_rank);
            }
            if self.epoch != epoch {
                return Err(EngineError::Internal("a rank was lost while the world was measured".into()));
            }
        }
        let all: Vec<Measured> = measured.into_iter().flatten().collect();
        let exchange_s = all.iter().map(|m| m.exchange_s).fold(0.0, f64::max);
        let (ranks, links) = all.into_iter().map(|m| (m.times, m.links)).unzip();
        Ok(Measurements { ranks, links, exchange_s, loads: Vec::new() })
    }

    /// Runs on in another way: the ranks keep their weights, but for experts that `table` places elsewhere. No request
    /// may be open.
    ///
    /// # Errors
    /// A table that does not fit; a rank that is lost on the way.
    pub fn change(
        &mut self,
        strategy: Strategy,
        schedule: Schedule,
        table: Option<PlacementTable>,
    ) -> Result<(), EngineError> {
        (self.options.strategy, self.options.schedule) = (strategy, schedule);
        if let Some(table) = table {
            self.options.placement = PlacementSource::Table(table);
        }
        self.group.change(&self.options);
        let _ = self.commands.send(Command::Stop { again: true });
        if let Some(running) = self.running.take() {
            running.finish(&mut self.host)?;
        }
        let adapters = self.adapters.clone();
        let world = self.group.form(&self.options, &self.host.spec, self.epoch + 1)?;
        self.host.load(&world.plan, Rank(0), &NoProgress)?;
        self.cache_blocks = world.plan.cache_blocks;
        self.begin(world)?;
        for (now, before) in self.adapters.iter_mut().zip(adapters) {
            if now.is_empty() {
                *now = before;
            }
        }
        Ok(())
    }
}

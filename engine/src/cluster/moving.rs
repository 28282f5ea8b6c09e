//! Experts that move while requests run.

use super::Cluster;
use super::sizing::Sizes;
use crate::EngineError;
use crate::runtime::{Command, Event, MoveEnd};
use exflow_placement::PlacementTable;

impl Cluster {
    /// Has experts move to where `table` has them while requests run on; [`Event::Moved`] tells how that ended.
    ///
    /// # Errors
    /// A table that does not fit this model and world, ranks that are lost, experts that are moving already.
    pub(crate) fn move_to(&mut self, table: PlacementTable) -> Result<(), EngineError> {
        let spec = self.spec();
        table.check_fits(spec.moe_layers(), spec.experts, self.options.ranks, Some(&spec.digest))?;
        if self.moves {
            return Err(EngineError::usage("experts are moving already", "wait until they have moved"));
        }
        if let Some(rank) = self.absent.first() {
            let what = format!("experts cannot move while rank {rank} is lost");
            return Err(EngineError::usage(what, "start it again"));
        }
        self.moves = true;
        self.command(Command::Move(Box::new(table)))
    }

    /// Whether experts move.
    pub(crate) fn moves(&self) -> bool {
        self.moves
    }

    /// Bytes of an expert on a device.
    pub(crate) fn expert_bytes(&self) -> u64 {
        Sizes::of(&self.options, self.spec(), None).expert
    }

    /// Takes note of how a move ended.
    pub(super) fn moved(&mut self, end: &MoveEnd) {
        self.moves = false;
        match &end.outcome {
            Ok(table) => {
                self.table = table.clone();
                self.group.place(table);
                self.tell(&format!(
                    "{} experts were read and moved in {:.1} s; {} tokens were told while they were read",
                    end.experts, end.seconds, end.tokens
                ));
            }
            Err(why) => self.tell(&format!("experts stay where they are: {why}")),
        }
    }

    /// The world was made anew: what moved in it did not come to an end.
    pub(super) fn stop_moving(&mut self) {
        if self.moves {
            let end = MoveEnd::refused("a rank was lost while they moved".into());
            let _ = self.events_in.send(Event::Moved(Box::new(end)));
        }
    }
}

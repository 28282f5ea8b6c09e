//! Experts move to where another table has them, while requests run.
//!
//! Rank 0 orders it in three steps, each when all ranks have done the one before. *Load*: every rank reads the experts
//! that the other table gives it, on a thread of its own, and puts them beside those that it has, a piece at a time between
//! steps; keys and values go to the domains of both tables. *Turn*: every sequence's next token goes by the other
//! table. *Settle*, once no token goes by the old one: what only that one had is given up, again by pieces. A
//! rank that has no room for both says so before it loads anything, and all go on with the table that they have.

mod director;
mod filling;
mod pace;

use director::View;
pub(crate) use director::{Director, MoveEnd};
use filling::Debt;
use pace::Pace;

use super::tables::Edition;
use super::worker::{Event, Worker};
use crate::EngineError;
use crate::model::ModelSpec;
use crate::options::{Dtype, Quant};
use crate::stats::gib;
use crate::weights::{Assembly, PackedExperts, Shelf, Store};
use exflow_placement::{ExpertId, LayerId, Outlook, PlacementTable, Rank, Replica, Strategy};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

/// While experts move a rank with nothing else to do looks so often for what is to be done.
pub(super) const GLANCE: Duration = Duration::from_millis(5);

/// What rank 0 orders about experts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum MoveOrder {
    Load {
        edition: Edition,
        assignment: Vec<Vec<Rank>>,
        replicas: Vec<Replica>,
        outlook: Option<Outlook>,
    },
    Turn,
    Settle {
        /// Of each sequence, where what may have been made by who had not heard of the other table ends.
        ends: Vec<(u32, u32)>,
    },
    /// Stay with the old table.
    GiveUp,
}

/// What a rank tells rank 0 about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum MoveNews {
    /// It has the experts of both tables, and the contexts that go with them; so many experts were read.
    Loaded(u32),
    /// It cannot have them.
    Refused(String),
    /// It has those of one table alone.
    Settled,
}

/// Where a rank's experts come from, and the room that there is for them.
#[derive(Clone)]
pub(crate) struct Stock {
    pub(crate) store: Arc<Store>,
    pub(crate) held_as: (Dtype, Option<Quant>),
    /// One expert.
    pub(crate) expert_bytes: u64,
    /// For all experts of a rank, where it was said what it may take.
    pub(crate) most_bytes: Option<u64>,
    /// Ranks of this process, which may share what is free.
    pub(crate) ranks_here: u64,
}

/// A move under way, as one rank sees it.
#[derive(Default)]
pub(crate) struct Moving {
    reading: Option<Reading>,
    /// A layer that is put together.
    assembly: Option<Assembly>,
    pace: Pace,
    /// Experts that were read, while the contexts that go with them are still to come.
    read: Option<u32>,
    /// What this rank is to get: (sequence, layer).
    awaited: Vec<(u32, usize)>,
    debts: Vec<Debt>,
    /// Layers that may hold experts which no table has any more.
    leaving: Vec<usize>,
    settles: bool,
    /// What rank 0 is to be told.
    pub(super) news: Vec<MoveNews>,
}

/// Experts on their way from disk.
struct Reading {
    layers: Receiver<Result<PackedExperts, EngineError>>,
    count: u32,
}

impl Moving {
    /// Whether experts are on their way, in or out.
    fn has_work(&self) -> bool {
        self.reading.is_some() || self.read.is_some() || self.settles
    }

    /// Whether there is something to do that nobody will ask for.
    pub(super) fn is_busy(&self) -> bool {
        self.has_work() || !self.debts.is_empty()
    }
}

impl Worker {
    /// Rank 0: has experts move to where `table` has them, or says why not.
    pub(super) fn begin_move(&mut self, table: PlacementTable) -> Option<MoveOrder> {
        let begun = self.check_move(&table).and_then(|()| self.director.begin(table, &self.tables));
        begun.map_err(|why| self.tell(Event::Moved(Box::new(MoveEnd::refused(why))))).ok()
    }

    fn check_move(&self, table: &PlacementTable) -> Result<(), String> {
        if let Some(rank) = self.comm.absent().iter().find(|rank| table.experts_per_rank()[rank.index()] > 0)
        {
            return Err(format!("rank {rank} is not there"));
        }
        // What a cache holds is passed on, but not what it was made from.
        if self.options.strategy == Strategy::Vanilla || self.decoder.remade.is_none() {
            return Ok(());
        }
        let spec = &self.decoder.spec;
        let before = (0..spec.layers).map(|layer| spec.moe_before(layer).map(LayerId::from));
        match self.tables.new_in_a_domain(&self.options.groups, table, before) {
            Some((layer, rank)) => Err(format!(
                "rank {rank} holds no context of layer {layer}, and gets none with --kv-wire hidden; use --kv-wire cache"
            )),
            None => Ok(()),
        }
    }

    /// Rank 0: what comes next in the move that is under way, if it is time for it.
    pub(super) fn next_of_move(&mut self) -> Option<MoveOrder> {
        let ranks = self.comm.world_size() - self.comm.absent().len();
        let view = View { tables: &self.tables, sequences: &self.sequences, ranks };
        let (order, end) = self.director.next(&view);
        if matches!(order, Some(MoveOrder::Turn)) {
            // Who starts from now on hears of it first.
            self.scheduler.edition = self.tables.edition().next();
        }
        if let Some(end) = end {
            self.tell(Event::Moved(Box::new(end)));
        }
        order
    }

    /// Carries out what rank 0 ordered about experts.
    pub(super) fn carry_out_move(&mut self, order: MoveOrder) -> Result<(), EngineError> {
        match order {
            MoveOrder::Load { edition, assignment, replicas, outlook } => {
                let mut table = PlacementTable::from_assignment(assignment, self.tables.now().ranks)?;
                table.set_replicas(replicas);
                table.outlook = outlook;
                table.check()?;
                let fresh = self.missing(&table);
                match self.room_for(&fresh) {
                    Err(why) => self.moving.news.push(MoveNews::Refused(why)),
                    Ok(()) => {
                        self.owe_contexts(&table);
                        self.tables.add(edition, table);
                        self.moving.reading = Some(self.read(fresh)?);
                    }
                }
            }
            MoveOrder::Turn => {
                self.tables.turn();
                self.sequences.turn_to(self.tables.edition());
            }
            MoveOrder::Settle { .. } | MoveOrder::GiveUp => {
                if let MoveOrder::Settle { ends } = order {
                    self.end_debts(&ends);
                } else {
                    self.moving.debts.clear();
                }
                self.tables.settle();
                (self.moving.reading, self.moving.read, self.moving.assembly) = (None, None, None);
                self.moving.awaited.clear();
                self.moving.leaving = (0..self.decoder.spec.layers).collect();
                self.moving.settles = true;
            }
        }
        Ok(())
    }

    /// The experts that this rank holds by a table, of each MoE layer.
    fn experts_by(&self, table: &PlacementTable) -> Vec<Vec<ExpertId>> {
        let me = self.comm.rank();
        (0..table.layers).map(|layer| table.experts_of(LayerId::from(layer), me)).collect()
    }

    /// By layer of the model, the experts of a table that are not here, where there are any.
    fn missing(&self, table: &PlacementTable) -> Vec<(usize, Vec<ExpertId>)> {
        let (held, wanted) = (self.decoder.weights.held(), self.experts_by(table));
        let of = |layer: usize| {
            let index = self.decoder.spec.moe_index(layer)?;
            let missing = wanted[index].iter().filter(|expert| !held[index].contains(expert));
            Some((layer, missing.copied().collect::<Vec<_>>()))
        };
        (0..self.decoder.spec.layers).filter_map(of).filter(|(_, fresh)| !fresh.is_empty()).collect()
    }

    /// Whether experts fit beside those that are here, with the layer that is put together at the time twice.
    fn room_for(&self, fresh: &[(usize, Vec<ExpertId>)]) -> Result<(), String> {
        let (stock, held) = (&self.options.stock, self.decoder.weights.held());
        let of_layer = |layer: usize| self.decoder.spec.moe_index(layer).map_or(0, |index| held[index].len());
        let coming: usize = fresh.iter().map(|(_, fresh)| fresh.len()).sum();
        let twice = fresh.iter().map(|(layer, fresh)| of_layer(*layer) + fresh.len()).max().unwrap_or(0);
        let needed = (coming + twice) as u64 * stock.expert_bytes;
        let here = held.iter().map(Vec::len).sum::<usize>() as u64 * stock.expert_bytes;
        let told = stock.most_bytes.map(|most| most.saturating_sub(here));
        // What is left to others, who need as much at the same time.
        let free = self.decoder.gpu.free_bytes().map(|free| free / 10 * 9 / stock.ranks_here.max(1));
        match told.into_iter().chain(free).min() {
            Some(room) if needed > room => Err(format!(
                "rank {}: {coming} experts beside those of the old table need {} for as long as they move, and there is \
                 room for {}: {} are missing",
                self.comm.rank(),
                gib(needed),
                gib(room),
                gib(needed - room)
            )),
            _ => Ok(()),
        }
    }

    fn read(&self, fresh: Vec<(usize, Vec<ExpertId>)>) -> Result<Reading, EngineError> {
        let count = fresh.iter().map(|(_, fresh)| fresh.len() as u32).sum();
        // One that is ready and one that is being read: more would take memory that nobody has counted.
        let (to, layers) = sync_channel(1);
        let (stock, spec): (Stock, ModelSpec) = (self.options.stock.clone(), self.decoder.spec.clone());
        let read = move || {
            let shelf = Shelf { spec: &spec, store: &stock.store, held_as: stock.held_as };
            for (layer, experts) in fresh {
                let read = shelf.read(layer, &experts);
                let failed = read.is_err();
                if to.send(read).is_err() || failed {
                    return; // nobody waits for it any more
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("reader {}", self.comm.rank()));
        thread.spawn(read).map_err(|e| EngineError::Internal(format!("no thread to read experts: {e}")))?;
        Ok(Reading { layers, count })
    }

    /// Between two steps: does a part of what the move takes.
    pub(super) fn move_on(&mut self) -> Result<(), EngineError> {
        self.pass_on()?;
        if !self.moving.has_work() {
            return Ok(());
        }
        // Where nothing runs there is nobody to hold up.
        let idle = self.sequences.running.is_empty();
        if self.moving.pace.rests() && !idle {
            return Ok(());
        }
        let began = Instant::now();
        while self.take_in_a_piece()? && idle && began.elapsed() < GLANCE {}
        if let Some(count) = self.moving.read
            && self.has_contexts()
        {
            self.moving.read = None;
            self.moving.news.push(MoveNews::Loaded(count));
        }
        if self.moving.settles && self.moving.assembly.is_none() && self.moving.leaving.is_empty() {
            self.end_settling();
        }
        Ok(())
    }

    /// Does a piece of a layer that is put together, of experts that were read or without those that leave; false: there is
    /// nothing to do now.
    fn take_in_a_piece(&mut self) -> Result<bool, EngineError> {
        let began = Instant::now();
        match self.assemble() {
            Ok(false) => return Ok(false),
            Ok(true) => {}
            Err(error) if self.moving.settles => return Err(error),
            Err(error) => {
                let why = format!("rank {}: {error}", self.comm.rank());
                self.moving.news.push(MoveNews::Refused(why));
                (self.moving.reading, self.moving.assembly) = (None, None);
            }
        }
        self.decoder.gpu.wait();
        self.moving.pace.took(began.elapsed());
        Ok(true)
    }

    fn assemble(&mut self) -> Result<bool, EngineError> {
        if self.moving.assembly.is_none() && !self.begin_a_layer()? {
            return Ok(false);
        }
        let Some(assembly) = &mut self.moving.assembly else { return Ok(false) };
        let (stock, gpu) = (&self.options.stock, &self.decoder.gpu);
        let shelf = Shelf { spec: &self.decoder.spec, store: &stock.store, held_as: stock.held_as };
        if self.decoder.weights.assemble_more(shelf, gpu, assembly, self.moving.pace.bytes)? {
            self.moving.assembly = None;
        }
        Ok(true)
    }

    /// Begins with the next layer, where there is one.
    fn begin_a_layer(&mut self) -> Result<bool, EngineError> {
        let next = match self.moving.settles {
            true => self.next_to_leave().map(|next| (next, None)),
            false => self.next_read()?,
        };
        let Some((next, read)) = next else { return Ok(false) };
        let (stock, gpu) = (&self.options.stock, &self.decoder.gpu);
        let shelf = Shelf { spec: &self.decoder.spec, store: &stock.store, held_as: stock.held_as };
        self.moving.assembly = Some(self.decoder.weights.assemble(shelf, gpu, next, read)?);
        Ok(true)
    }

    /// The next layer with experts that were read, and all that it will hold.
    #[allow(clippy::type_complexity, reason = "what assemble takes")]
    fn next_read(&mut self) -> Result<Option<((usize, Vec<ExpertId>), Option<PackedExperts>)>, EngineError> {
        let Some(reading) = &self.moving.reading else { return Ok(None) };
        let packed = match reading.layers.try_recv() {
            Err(TryRecvError::Empty) => return Ok(None),
            Err(TryRecvError::Disconnected) => {
                (self.moving.read, self.moving.reading) = (Some(reading.count), None);
                return Ok(None);
            }
            Ok(read) => read?,
        };
        let index = self.decoder.spec.moe_index(packed.layer).unwrap_or_default();
        let mut ids = self.decoder.weights.held().swap_remove(index);
        ids.extend(packed.ids());
        ids.sort_unstable();
        ids.dedup();
        Ok(Some(((packed.layer, ids), Some(packed))))
    }

    /// The next layer that holds experts which the table does not give it, and those that it is to keep.
    fn next_to_leave(&mut self) -> Option<(usize, Vec<ExpertId>)> {
        let (mut held, mut keep) = (self.decoder.weights.held(), self.experts_by(self.tables.now()));
        while let Some(layer) = self.moving.leaving.pop() {
            let Some(index) = self.decoder.spec.moe_index(layer) else { continue };
            if held[index] != keep[index] {
                held.clear();
                return Some((layer, keep.swap_remove(index)));
            }
        }
        None
    }

    fn end_settling(&mut self) {
        if self.moving.debts.is_empty() {
            self.moving.settles = false;
            self.moving.news.push(MoveNews::Settled);
        }
    }
}

//! One step of a rank: its tokens from embedding to sampled ids, with the exchanges between.

mod alone;
mod contexts;
mod exchange;
mod experts;
mod hop;
mod parts;
mod sample;
mod timing;

pub(crate) use alone::Submitted;
pub(crate) use contexts::Bulk;
pub(crate) use exchange::expected;
pub(crate) use hop::Hopped;
pub(crate) use parts::{Part, Passage};
pub(crate) use timing::TOGETHER_ROWS;

use super::bounds;
use super::coherence::Coherence;
use super::frames::Payloads;
use super::overlap::Peers;
use super::sequence::{Sampled, Sequence, Sequences};
use super::stats::RankStats;
use super::tables::{Edition, Tables};
use super::worker::Captured;
use crate::gpu::Recording;
use crate::model::decoder::Decoder;
use crate::options::{Combine, Overlap, Prefill};
use crate::{EngineError, ModelSpec};
use exflow_placement::{ExpertId, LayerId, Rank, Route, Strategy};
use exflow_transport::Communicator;

/// A token on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// The placement table that it goes by.
    pub(crate) edition: Edition,
    /// The rank that served its main choice at the layer before.
    pub(crate) main: Option<Rank>,
}

/// Which tokens a step works on.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) decode: bool,
    /// This rank's tokens with their ids.
    pub(crate) tokens: Vec<(Row, u32)>,
    /// Tokens of all ranks together, at most: as many as all ranks know of.
    pub(crate) total: usize,
}

/// What a step yields on one rank.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Of the sequences whose last token ended up here.
    pub(crate) sampled: Vec<Sampled>,
    pub(crate) captured: Vec<Captured>,
}

/// What a step works with.
pub(crate) struct Stepper<'a> {
    pub(crate) decoder: &'a mut Decoder,
    pub(crate) comm: &'a mut dyn Communicator,
    pub(crate) tables: &'a Tables,
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) prefill: Prefill,
    /// What runs while rows are on their way, in rounds.
    pub(crate) overlap: Overlap,
    /// `[R]` the group that each rank's sequences are bounded to; empty: to none.
    pub(crate) groups: &'a [u16],
    pub(crate) sequences: &'a Sequences,
    pub(crate) coherence: &'a mut Coherence,
    pub(crate) stats: &'a mut RankStats,
    pub(crate) round: &'a mut u64,
    /// Of prompts, and of decode steps.
    pub(crate) peers: &'a mut [Peers; 2],
    pub(crate) payloads: &'a mut Payloads,
}

impl Row {
    pub(crate) fn new(sequence: u32, position: u32, edition: Edition) -> Self {
        Self { sequence, position, edition, main: None }
    }
}

/// Layers whose keys and values travel in one frame, in decode steps.
pub(crate) const BULK_LAYERS: usize = 4;

/// What the device said of a layer's rows.
pub(crate) struct Routed {
    pub(crate) chosen: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    /// `[T, H]`, padded; this and the choices are empty at a dense layer.
    pub(crate) residual: Vec<f32>,
    /// What the rest of the domain is to have of the rows: `[T]` of queries, then keys and values, or `[T, H]`, padded, the
    /// residual streams that entered the layer. Empty where nobody needs it.
    context: Vec<f32>,
    routes: Vec<Route>,
}

impl Stepper<'_> {
    fn spec(&self) -> &ModelSpec {
        &self.decoder.spec
    }

    fn me(&self) -> Rank {
        self.comm.rank()
    }

    fn sequence(&self, id: u32) -> Result<&Sequence, EngineError> {
        self.sequences
            .running
            .get(&id)
            .ok_or_else(|| EngineError::Internal(format!("a row of sequence {id}, which does not run")))
    }

    /// Whether a row is of a prompt that every rank prefills.
    fn is_replicated(&self, row: &Row) -> bool {
        let of_prompt = |sequence: &Sequence| (row.position as usize) < sequence.start.prompt.len();
        self.prefill == Prefill::Replicated
            && self.sequences.running.get(&row.sequence).is_some_and(of_prompt)
    }

    /// Whether a row is here only because every rank prefills its prompt: what becomes of it is told by its home.
    fn is_copy(&self, row: &Row) -> bool {
        let home = self.sequences.running.get(&row.sequence).map(|sequence| sequence.start.home);
        home != Some(self.me()) && self.is_replicated(row)
    }

    /// The cache slot of a position, which rank 0 granted before it ordered the step.
    fn slot(&self, sequence: u32, position: u32) -> Result<u32, EngineError> {
        self.sequence(sequence)?.slot(position).ok_or_else(|| {
            EngineError::Internal(format!("sequence {sequence} has no cache block for position {position}"))
        })
    }

    /// Makes room for a step and uploads what its tokens are; returns the rows that are here.
    pub(crate) fn begin(&mut self, batch: &Batch) -> Result<Vec<Row>, EngineError> {
        self.decoder.reserve(batch.total, self.sequences.heads(batch.decode).min(batch.total))?;
        let ids: Vec<[u32; 2]> = batch.tokens.iter().map(|(row, id)| [*id, row.position]).collect();
        self.decoder.gpu.write(&self.decoder.scratch.tokens, 0, &ids);
        Ok(batch.tokens.iter().map(|(row, _)| *row).collect())
    }

    /// Attention and router of this rank's rows, and the plan of their routes.
    fn attend(&mut self, layer: usize, rows: &[Row], strategy: Strategy) -> Result<Routed, EngineError> {
        if rows.is_empty() {
            let (chosen, weights) = (Vec::new(), Vec::new());
            return Ok(Routed {
                chosen,
                weights,
                residual: Vec::new(),
                context: Vec::new(),
                routes: Vec::new(),
            });
        }
        let _span = tracing::debug_span!("attend", layer).entered();
        let arrived = self.take_arrived(layer)?;
        let (count, top_k) = (rows.len(), self.spec().top_k);
        let replicated = self.is_replicated(&rows[0]);
        let spread = self.spreads() && !replicated;
        let homes = rows.iter().map(|row| Ok(self.sequence(row.sequence)?.start.home));
        let homes = homes.collect::<Result<Vec<_>, EngineError>>()?;
        let decoder = &*self.decoder;
        let mut r = decoder.record();
        let blocks = self.write_contexts(&mut r, rows)?;
        if layer == 0 {
            decoder.embed(&mut r, count, false);
        }
        decoder.append_arrived(&mut r, layer, arrived);
        decoder.attend(&mut r, layer, count, blocks);
        let moe = decoder.spec.moe_index(layer);
        if moe.is_none() {
            decoder.norm_ffn(&mut r, layer, 0, count);
        }
        if let Some(index) = moe {
            decoder.route(&mut r, layer, count);
            r.read::<u32>(&decoder.scratch.chosen[index], 0, count * top_k);
            r.read::<f32>(&decoder.scratch.weights[index], 0, count * top_k);
            r.read::<f32>(decoder.scratch.x(), 0, count * 4 * decoder.spec.h4());
        }
        if spread {
            read_context(decoder, &mut r, count);
        }
        let mut parts = r.submit()?.fetch()?.into_iter();
        let mut next = |wanted: bool| if wanted { parts.next() } else { None };
        let (chosen, weights) = (words(next(moe.is_some())), floats(next(moe.is_some())));
        let (residual, context) = (floats(next(moe.is_some())), floats(next(spread)));
        for row in rows {
            self.coherence.note(layer as u16, row.sequence, row.position);
        }
        let me = self.me();
        let route = |t: usize, index: usize| {
            let table = self.tables.of(rows[t].edition)?;
            let range = t * top_k..(t + 1) * top_k;
            let experts: Vec<_> = chosen[range.clone()].iter().map(|&e| ExpertId::from(e as usize)).collect();
            let layer = LayerId::from(index);
            Ok(match replicated {
                // Every rank plans what the home would, and keeps its own copy of the row.
                true => {
                    Route { next: me, ..table.route(strategy, layer, homes[t], &experts, &weights[range]) }
                }
                false => {
                    let at = (homes[t], me);
                    bounds::route(self.groups, table, (strategy, layer), at, &experts, &weights[range])
                }
            })
        };
        let routes = moe.map(|index| (0..count).map(|t| route(t, index)).collect());
        let routes = routes.unwrap_or(Ok::<_, EngineError>(Vec::new()))?;
        Ok(Routed { chosen, weights, residual, context, routes })
    }

    /// Whether keys and values travel.
    fn spreads(&self) -> bool {
        self.strategy == Strategy::Coherent
    }

    fn count_stays(&mut self, rows: &[Row], routed: &Routed) {
        for (row, route) in rows.iter().zip(&routed.routes) {
            if let Some(main) = row.main {
                self.stats.transitions += 1;
                self.stats.stays += u64::from(main == route.serving[0]);
            }
        }
    }
}

/// Has read back what the rest of the domain is to have of rows that have just passed attention.
fn read_context(decoder: &Decoder, r: &mut Recording<'_>, rows: usize) {
    let (s, spec) = (&decoder.scratch, &decoder.spec);
    match &decoder.remade {
        // Attention has read what it was given here, and written to the other buffer.
        Some(_) => r.read::<f32>(s.x_next(), 0, rows * 4 * spec.h4()),
        None => r.read::<f32>(&s.qkv, 0, rows * 4 * spec.attention.qkv4()),
    }
}

fn words(bytes: Option<Vec<u8>>) -> Vec<u32> {
    bytes.map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default()
}

fn floats(bytes: Option<Vec<u8>>) -> Vec<f32> {
    bytes.map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default()
}

/// What comes in so many read-backs, one behind the other.
fn rows_of(parts: &mut impl Iterator<Item = Vec<u8>>, reads: usize) -> Vec<f32> {
    let mut all = if reads > 0 { floats(parts.next()) } else { Vec::new() };
    (1..reads).for_each(|_| all.extend(floats(parts.next())));
    all
}

//! A layer's experts put together anew while those that are there serve: a piece at a time, so that nobody waits long.

use super::chunks::Chunk;
use super::experts::{Experts, Ffn, PackedExperts, PackedFfn, Shelf};
use super::layers::{Dense, Loader, Matrix, ModelWeights};
use super::pack;
use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Part, Usage};
use exflow_placement::ExpertId;
use std::collections::VecDeque;

/// Bytes of a unit.
const UNIT_BYTES: usize = size_of::<pack::Unit>();

/// Experts of a layer on their way to where they will stand.
pub(crate) struct Assembly {
    layer: usize,
    /// Those that will be there, ascending.
    ids: Vec<ExpertId>,
    chunks: Vec<Chunk>,
    packed: PackedFfn,
    pieces: VecDeque<Piece>,
}

/// Consecutive units of one matrix of an expert.
#[derive(Clone, Copy)]
struct Piece {
    /// The matrix below, in place of that above.
    down: bool,
    source: Source,
    /// The first unit at the source, counted in its chunk or in what was packed.
    first: usize,
    /// Where it will stand: the chunk, and the first unit there.
    chunk: usize,
    at: usize,
    units: usize,
}

#[derive(Clone, Copy)]
enum Source {
    Packed,
    /// In this chunk of those that serve.
    Held(usize),
}

/// Where an expert comes from: its source, its number there, and how many are there.
type Origin = (Source, usize, usize);

impl Piece {
    /// Takes the first units off, `most` of them.
    fn split(&mut self, most: usize) -> Self {
        let units = self.units.min(most.max(1));
        let first = Self { units, ..*self };
        (self.first, self.at, self.units) = (self.first + units, self.at + units, self.units - units);
        first
    }
}

fn matrix(ffn: &Ffn, down: bool) -> &Dense {
    if down { &ffn.down } else { &ffn.up }
}

impl PackedFfn {
    fn matrix(&self, down: bool) -> (&[pack::Unit], &[f32]) {
        if down { (&self.down, &self.down_bias) } else { (&self.up, &self.up_bias) }
    }
}

impl ModelWeights {
    /// Begins to put a layer's experts `ids` together, of those that are there and those that were read. Biases, which are
    /// small, are put there at once.
    ///
    /// # Errors
    /// An expert that is neither; no memory.
    pub(crate) fn assemble(
        &mut self,
        shelf: Shelf<'_>,
        gpu: &Gpu,
        (layer, ids): (usize, Vec<ExpertId>),
        read: Option<PackedExperts>,
    ) -> Result<Assembly, EngineError> {
        let mut ignore = |_| ();
        let loader = shelf.loader(gpu, &mut ignore);
        let there = &*self.experts(layer)?;
        let (fresh, packed) = read.map_or_else(Default::default, |read| (read.ids, read.ffn));
        let origin = |id: &ExpertId| {
            let read = fresh.iter().position(|fresh| fresh == id).map(|at| (Source::Packed, at, fresh.len()));
            let held = || {
                let (chunk, at) = there.place_of(*id)?;
                Some((Source::Held(chunk), at, there.chunks[chunk].count))
            };
            read.or_else(held).ok_or_else(|| {
                EngineError::Internal(format!("layer {layer}: expert {id} is not here and was not read"))
            })
        };
        let origins = ids.iter().map(origin).collect::<Result<Vec<_>, _>>()?;
        let mut assembly = Assembly { layer, ids, chunks: Vec::new(), packed, pieces: VecDeque::new() };
        for (first, origins) in loader.cut(layer, &origins) {
            let mut dense = |down| assembly.dense(&loader, there, origins, down);
            let (up, down) = (dense(false)?, dense(true)?);
            let ffn = Ffn { spec: loader.spec.expert, up, down };
            assembly.chunks.push(Chunk { first, count: origins.len(), ffn });
        }
        Ok(assembly)
    }

    /// Puts so many bytes more where they will stand, a unit at least; true: all are there, and serve from now on. Nothing
    /// may be recorded and not submitted.
    ///
    /// # Errors
    /// A layer without experts.
    pub(crate) fn assemble_more(
        &mut self,
        shelf: Shelf<'_>,
        gpu: &Gpu,
        assembly: &mut Assembly,
        bytes: usize,
    ) -> Result<bool, EngineError> {
        let mut ignore = |_| ();
        let there = self.experts(assembly.layer)?;
        assembly.put(gpu, there, bytes / UNIT_BYTES);
        if !assembly.pieces.is_empty() {
            return Ok(false);
        }
        let local = shelf.loader(gpu, &mut ignore).numbers(&assembly.ids);
        let before =
            std::mem::replace(there, Experts { local, chunks: std::mem::take(&mut assembly.chunks) });
        let ffns = before.chunks.iter().flat_map(|chunk| [&chunk.ffn.up, &chunk.ffn.down]);
        gpu.forget_bindings_of(ffns.flat_map(|dense| [&dense.weight.buffer].into_iter().chain(&dense.bias)));
        Ok(true)
    }
}

impl Assembly {
    /// Room for one matrix of the experts of a chunk, its biases, and notes of the pieces to come.
    fn dense(
        &mut self,
        loader: &Loader<'_>,
        there: &Experts,
        origins: &[Origin],
        down: bool,
    ) -> Result<Dense, EngineError> {
        let (gpu, spec) = (loader.gpu, loader.spec);
        let label = loader.names.of_layer(self.layer, loader.names.moe);
        let (h, i) = (4 * spec.h4(), 4 * spec.expert.i4());
        let held = |chunk: usize| matrix(&there.chunks[chunk].ffn, down);
        let units = origins.first().map_or(0, |&(source, _, count)| match source {
            Source::Packed => self.packed.matrix(down).0.len() / count,
            Source::Held(chunk) => held(chunk).weight.units / count,
        });
        let form = loader.expert_form(self.layer);
        let size = if down { (h, i) } else { (i, h) };
        let weight: Matrix = loader.empty_matrix(&label, form, units * origins.len(), size)?;
        for (index, &(source, number, _)) in origins.iter().enumerate() {
            let (first, chunk, at) = (number * units, self.chunks.len(), index * units);
            self.pieces.push_back(Piece { down, source, first, chunk, at, units });
        }
        if !spec.expert.bias {
            return Ok(Dense { weight, bias: None });
        }
        let biases = |&(source, _, count): &Origin| match source {
            Source::Packed => self.packed.matrix(down).1.len() / 4 / count,
            Source::Held(chunk) => {
                held(chunk).bias.as_ref().map_or(0, |bias| bias.bytes() as usize / UNIT_BYTES / count)
            }
        };
        let units = origins.first().map_or(0, biases);
        let bias: Buffer = gpu.buffer(&label, (UNIT_BYTES * units * origins.len()) as u64, Usage::Storage)?;
        let mut copies = Vec::new();
        for (index, &(source, number, _)) in origins.iter().enumerate() {
            let (first, at) = (number * units, index * units);
            match source {
                Source::Packed => {
                    let values = &self.packed.matrix(down).1[4 * first..4 * (first + units)];
                    gpu.write(&bias, (UNIT_BYTES * at) as u64, values);
                }
                Source::Held(chunk) => {
                    let of = held(chunk).bias.as_ref().map(|of| (Part { of, first, units }, &bias, at));
                    copies.extend(of);
                }
            }
        }
        gpu.copy_units(copies.into_iter());
        Ok(Dense { weight, bias: Some(bias) })
    }

    /// Puts so many units where they will stand, one at least.
    fn put(&mut self, gpu: &Gpu, there: &Experts, mut units: usize) {
        let mut copies = Vec::new();
        while let Some(piece) = self.pieces.front_mut() {
            let now = piece.split(units);
            if piece.units == 0 {
                self.pieces.pop_front();
            }
            let to = &matrix(&self.chunks[now.chunk].ffn, now.down).weight.buffer;
            match now.source {
                Source::Packed => {
                    let all = self.packed.matrix(now.down).0;
                    gpu.put_units(to, now.at, &all[now.first..now.first + now.units]);
                }
                Source::Held(chunk) => {
                    let of = &matrix(&there.chunks[chunk].ffn, now.down).weight.buffer;
                    copies.push((Part { of, first: now.first, units: now.units }, to, now.at));
                }
            }
            units = units.saturating_sub(now.units);
            if units == 0 {
                break;
            }
        }
        gpu.copy_units(copies.into_iter());
    }
}

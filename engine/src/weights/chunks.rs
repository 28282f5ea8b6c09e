//! Experts in chunks of whole ones: as many together as one binding takes.

use super::experts::{Ffn, PackedFfn};
use super::layers::{Dense, Loader, Matrix};
use crate::EngineError;
use crate::gpu::Buffer;
use exflow_placement::ExpertId;
use exflow_shaders::Weights;

/// Whole experts whose matrices are bound together.
pub(crate) struct Chunk {
    /// Local number of the first.
    pub(crate) first: usize,
    /// How many they are, 1 at least.
    pub(crate) count: usize,
    pub(crate) ffn: Ffn,
}

impl Loader<'_> {
    /// Experts into memory that is theirs from the beginning: each is on its way to the device before the next one is read.
    pub(super) fn chunk(&mut self, label: &str, layer: usize, ids: &[ExpertId]) -> Result<Ffn, EngineError> {
        let spec = self.spec.expert;
        let (h, i) = (4 * self.spec.h4(), 4 * spec.i4());
        let mut biases = PackedFfn::default();
        let mut matrices: Option<[Matrix; 2]> = None;
        for (index, &id) in ids.iter().enumerate() {
            let one = self.pack_experts(layer, &[id])?;
            let [up, down] = match &matrices {
                Some(there) => there,
                None => {
                    let empty =
                        |units: usize, size| self.empty_matrix(label, one.form, units * ids.len(), size);
                    matrices.insert([empty(one.up.len(), (i, h))?, empty(one.down.len(), (h, i))?])
                }
            };
            self.gpu.put_units(&up.buffer, index * one.up.len(), &one.up);
            self.gpu.put_units(&down.buffer, index * one.down.len(), &one.down);
            biases.up_bias.extend(one.up_bias);
            biases.down_bias.extend(one.down_bias);
            self.store.release_some();
        }
        let [up, down] =
            matrices.ok_or_else(|| EngineError::Internal(format!("{label}: a chunk without experts")))?;
        let bias = |values: Vec<f32>| -> Result<Option<Buffer>, EngineError> {
            if spec.bias { self.gpu.buffer_of(label, &values).map(Some) } else { Ok(None) }
        };
        Ok(Ffn {
            spec,
            up: Dense { weight: up, bias: bias(biases.up_bias)? },
            down: Dense { weight: down, bias: bias(biases.down_bias)? },
        })
    }

    /// Chunks of a list by local numbers, with the number of each one's first.
    pub(super) fn cut<'t, T>(
        &self,
        layer: usize,
        all: &'t [T],
    ) -> impl Iterator<Item = (usize, &'t [T])> + use<'t, T> {
        let most = self.per_chunk(self.expert_form(layer));
        all.chunks(most).enumerate().map(move |(index, chunk)| (index * most, chunk))
    }

    /// How many experts one binding takes; 1 also where that is too large, which its buffer will tell.
    fn per_chunk(&self, form: Weights) -> usize {
        let spec = self.spec.expert;
        let (h, i) = (4 * self.spec.h4(), 4 * spec.i4());
        let bytes = |rows: usize, columns: usize| 16 * (rows * form.units(columns).1) as u64;
        let largest = bytes(spec.activation.matrices() * i, h).max(bytes(h, i)).max(1);
        (self.gpu.max_matrix_bytes(form) / largest).max(1) as usize
    }
}

//! The weights that one rank holds, padded as the kernels want them: rows to whole vec4s, heads one by one.

use super::Store;
use crate::EngineError;
use crate::gpu::{Buffer, Gpu};
use crate::model::ModelSpec;
use exflow_placement::ExpertId;

/// A norm's weight and bias, `[H]` each.
pub(crate) struct Norm {
    pub(crate) weight: Buffer,
    pub(crate) bias: Buffer,
}

/// A matrix `[N, K]` with bias `[N]`.
pub(crate) struct Dense {
    pub(crate) weight: Buffer,
    pub(crate) bias: Buffer,
}

/// The experts of one layer that this rank holds, in ascending order of their ids.
pub(crate) struct Experts {
    /// Local number of each logical expert, by its id.
    pub(crate) local: Vec<Option<u32>>,
    /// `w1` `[experts, I, H]` and `b1` `[experts, I]`.
    pub(crate) up: Dense,
    /// `w2` `[experts, H, I]` and `b2` `[experts, H]`.
    pub(crate) down: Dense,
}

/// One layer.
pub(crate) struct LayerWeights {
    pub(crate) norm_1: Norm,
    /// Queries, keys, values: `[3 * heads * D, H]`.
    pub(crate) qkv: Dense,
    /// `[H, heads * D]`.
    pub(crate) projection: Dense,
    pub(crate) norm_2: Norm,
    /// `[E, H]`.
    pub(crate) router: Buffer,
    pub(crate) experts: Experts,
}

/// All that one rank holds.
pub(crate) struct ModelWeights {
    pub(crate) token_embedding: Buffer,
    pub(crate) position_embedding: Buffer,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) final_norm: Norm,
    /// `[V, H]`.
    pub(crate) head: Buffer,
}

/// A matrix read from disk on its way to the padded form.
struct Rows {
    values: Vec<f32>,
    columns: usize,
}

impl Rows {
    /// Pads every row with zeros to `columns`.
    fn widen(self, columns: usize) -> Self {
        if columns == self.columns {
            return self;
        }
        let mut values = vec![0.0; self.values.len() / self.columns * columns];
        for (to, from) in values.chunks_exact_mut(columns).zip(self.values.chunks_exact(self.columns)) {
            to[..self.columns].copy_from_slice(from);
        }
        Self { values, columns }
    }

    /// Pads every group of `group` rows with rows of zeros to `padded`.
    fn lengthen(self, group: usize, padded: usize) -> Self {
        let (from, to) = (group * self.columns, padded * self.columns);
        Self { values: Rows { values: self.values, columns: from }.widen(to).values, columns: self.columns }
    }
}

/// Reads one rank's weights onto its device.
pub(crate) struct Loader<'a> {
    spec: &'a ModelSpec,
    store: &'a Store,
    gpu: &'a Gpu,
    read: &'a mut dyn FnMut(u64),
}

impl ModelWeights {
    /// Loads everything but experts, and of each layer the experts in `experts[layer]`; `read` is told the
    /// elements read so far, for progress.
    pub(crate) fn load(
        spec: &ModelSpec,
        store: &Store,
        gpu: &Gpu,
        experts: &[Vec<ExpertId>],
        read: &mut dyn FnMut(u64),
    ) -> Result<Self, EngineError> {
        let mut loader = Loader { spec, store, gpu, read };
        let (vocab, hidden) = (spec.vocab_size, spec.hidden);
        let token_embedding = loader.matrix("wte.weight", vocab, hidden)?;
        let position_embedding = loader.matrix("wpe.weight", spec.max_positions, hidden)?;
        let layers =
            experts.iter().enumerate().map(|(l, held)| loader.layer(l, held)).collect::<Result<_, _>>()?;
        let final_norm = loader.norm("ln_f")?;
        let head = match spec.tied_head {
            true => token_embedding.clone(),
            false => loader.matrix("lm_head.weight", vocab, hidden)?,
        };
        Ok(Self { token_embedding, position_embedding, layers, final_norm, head })
    }
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize, held: &[ExpertId]) -> Result<LayerWeights, EngineError> {
        let name = |part: &str| format!("h.{layer}.{part}");
        Ok(LayerWeights {
            norm_1: self.norm(&name("ln_1"))?,
            qkv: self.qkv(&name("attn.c_attn"))?,
            projection: self.projection(&name("attn.c_proj"))?,
            norm_2: self.norm(&name("ln_2"))?,
            router: self.matrix(&name("moe.gate.weight"), self.spec.experts, self.spec.hidden)?,
            experts: self.experts(&name("moe"), held)?,
        })
    }

    fn norm(&mut self, name: &str) -> Result<Norm, EngineError> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"))?,
            bias: self.vector(&format!("{name}.bias"))?,
        })
    }

    fn vector(&mut self, name: &str) -> Result<Buffer, EngineError> {
        let hidden = self.spec.hidden;
        let rows = self.rows(name, &[hidden], hidden, 0..hidden)?;
        self.upload(name, rows.widen(self.spec.h4() * 4))
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Buffer, EngineError> {
        let read = self.rows(name, &[rows, columns], columns, 0..rows * columns)?;
        let padded = read.widen(columns.next_multiple_of(4)).lengthen(rows, rows.next_multiple_of(4));
        self.upload(name, padded)
    }

    /// `[3H, H]`, q above k above v; each head's rows are padded to a whole number of vec4s.
    fn qkv(&mut self, name: &str) -> Result<Dense, EngineError> {
        let (hidden, d, d4) = (self.spec.hidden, self.spec.head_dim(), self.spec.d4() * 4);
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        let rows = self.rows(&weight, &[3 * hidden, hidden], hidden, 0..3 * hidden * hidden)?;
        let weight = self.upload(&weight, rows.widen(self.spec.h4() * 4).lengthen(d, d4))?;
        let rows = self.rows(&bias, &[3 * hidden], d, 0..3 * hidden)?;
        let bias = self.upload(&bias, rows.widen(d4))?;
        Ok(Dense { weight, bias })
    }

    /// `[H, H]`, whose columns follow the padded heads.
    fn projection(&mut self, name: &str) -> Result<Dense, EngineError> {
        let (hidden, d, d4, kv4) =
            (self.spec.hidden, self.spec.head_dim(), self.spec.d4() * 4, self.spec.kv4() * 4);
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        let rows = self.rows(&weight, &[hidden, hidden], d, 0..hidden * hidden)?.widen(d4);
        let rows = Rows { values: rows.values, columns: kv4 }.lengthen(hidden, self.spec.h4() * 4);
        Ok(Dense { weight: self.upload(&weight, rows)?, bias: self.vector(&bias)? })
    }

    fn experts(&mut self, name: &str, held: &[ExpertId]) -> Result<Experts, EngineError> {
        let (hidden, inner, count) = (self.spec.hidden, self.spec.intermediate, self.spec.experts);
        let mut local = vec![None; count];
        for (index, expert) in held.iter().enumerate() {
            local[expert.index()] = Some(index as u32);
        }
        Ok(Experts {
            local,
            up: Dense {
                weight: self.held(&format!("{name}.w1"), held, &[count, inner, hidden])?,
                bias: self.held(&format!("{name}.b1"), held, &[count, inner])?,
            },
            down: Dense {
                weight: self.held(&format!("{name}.w2"), held, &[count, hidden, inner])?,
                bias: self.held(&format!("{name}.b2"), held, &[count, hidden])?,
            },
        })
    }

    /// The slices of the experts in `held` of a tensor `[E, N, K]` or `[E, N]`.
    fn held(&mut self, name: &str, held: &[ExpertId], shape: &[usize]) -> Result<Buffer, EngineError> {
        let size: usize = shape[1..].iter().product();
        let columns = shape[shape.len() - 1];
        let mut values = Vec::new();
        for expert in held {
            let first = expert.index() * size;
            let mut rows =
                self.rows(name, shape, columns, first..first + size)?.widen(columns.next_multiple_of(4));
            if let [_, n, _] = *shape {
                rows = rows.lengthen(n, n.next_multiple_of(4));
            }
            values.extend_from_slice(&rows.values);
        }
        self.upload(name, Rows { values, columns })
    }

    fn rows(
        &mut self,
        name: &str,
        shape: &[usize],
        columns: usize,
        range: std::ops::Range<usize>,
    ) -> Result<Rows, EngineError> {
        let values = self.store.read(name, shape, range)?;
        (self.read)(values.len() as u64);
        Ok(Rows { values, columns })
    }

    fn upload(&self, name: &str, rows: Rows) -> Result<Buffer, EngineError> {
        self.gpu.buffer_of(name, &rows.values)
    }
}

#[cfg(test)]
mod tests {
    use super::Rows;

    #[test]
    fn rows_and_groups_are_padded_with_zeros() {
        let rows = Rows { values: vec![1., 2., 3., 4., 5., 6.], columns: 3 };
        let padded = rows.widen(4).lengthen(1, 2);
        let expected = [1., 2., 3., 0., 0., 0., 0., 0., 4., 5., 6., 0., 0., 0., 0., 0.];
        assert_eq!(padded.values, expected);
    }
}

//! The weights that one rank holds, padded as the kernels want them: rows to whole vec4s, heads one by one.

use super::Store;
use super::attention::AttentionWeights;
use super::experts::{Experts, Ffn};
use super::names::Names;
use super::pack;
use super::rows::Rows;
use super::vocabulary::VocabularyChunk;
use crate::EngineError;
use crate::gpu::{Buffer, Gpu};
use crate::model::ModelSpec;
use crate::options::{Dtype, Quant};
use exflow_placement::ExpertId;
use exflow_shaders::Weights;

/// A norm's weight, and bias where it has one, `[H]` each.
pub(crate) struct Norm {
    pub(crate) weight: Buffer,
    pub(crate) bias: Option<Buffer>,
}

/// A matrix on the device, in the order of `shared/weight.wgsl`.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) buffer: Buffer,
    /// How its weights lie.
    pub(crate) form: Weights,
    /// vec4s of rows of each of the matrices in the buffer.
    pub(crate) height4: usize,
    /// vec4s of columns.
    pub(crate) width4: usize,
    /// Units of 16 bytes of all of them.
    pub(super) units: usize,
}

impl Matrix {
    /// Bytes of its weights and scales, without what a texture has behind them.
    pub(crate) fn bytes(&self) -> usize {
        16 * self.units
    }
}

/// A matrix `[N, K]`, with a bias `[N]` where it has one.
pub(crate) struct Dense {
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Buffer>,
}

/// One layer.
pub(crate) struct LayerWeights {
    pub(crate) norm_1: Norm,
    pub(crate) attention: AttentionWeights,
    pub(crate) norm_2: Norm,
    pub(crate) ffn: LayerFfn,
}

/// What stands behind a layer's attention.
#[allow(clippy::large_enum_variant, reason = "there is one per layer")]
pub(crate) enum LayerFfn {
    Moe {
        /// What the router needs: weight and bias of the norm `[2, H]`, its matrix `[E, H]`, bias and correction `[2, E]`.
        router: Buffer,
        experts: Experts,
        /// The shared expert, and the row `[H]` that decides how much of it is taken.
        shared: Option<(Ffn, Option<Buffer>)>,
    },
    Dense(Ffn),
}

/// All that one rank holds.
pub(crate) struct ModelWeights {
    /// How matrices lie, the embedding's and packed experts' apart.
    pub(crate) form: Weights,
    /// `[V, H]`, in f32.
    pub(crate) embedding: Vec<VocabularyChunk>,
    pub(crate) position_embedding: Option<Buffer>,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) final_norm: Norm,
    /// `[V, H]`.
    pub(crate) head: Vec<VocabularyChunk>,
}

/// Reads one rank's weights onto its device; without one (`G` is `()`) it can read and pack, on any thread.
pub(super) struct Loader<'a, G = &'a Gpu> {
    pub(super) spec: &'a ModelSpec,
    pub(super) names: Names,
    pub(super) store: &'a Store,
    pub(super) gpu: G,
    /// How matrices are held.
    pub(super) form: Weights,
    /// Whether they were asked to be rounded.
    pub(super) rounds: bool,
    pub(super) read: &'a mut dyn FnMut(u64),
}

impl ModelWeights {
    /// Loads everything but experts, and of each MoE layer the experts in `experts[layer]`; `read` is told the
    /// elements read so far, for progress.
    pub(crate) fn load(
        spec: &ModelSpec,
        store: &Store,
        gpu: &Gpu,
        experts: &[Vec<ExpertId>],
        (dtype, quant): (Dtype, Option<Quant>),
        read: &mut dyn FnMut(u64),
    ) -> Result<Self, EngineError> {
        let form = form_of(dtype, quant);
        let rounds = quant.is_some();
        let mut loader = Loader { spec, names: Names::of(spec), store, gpu, form, rounds, read };
        let embedding = loader.embedding()?;
        let position_embedding = match spec.learned_positions {
            true => Some(loader.matrix("wpe.weight", spec.max_positions, spec.hidden)?),
            false => None,
        };
        // The largest tensors come first, while there is least beside them.
        store.release();
        let head = loader.head(&embedding)?;
        store.release();
        let layer = |layer| {
            let held = spec.moe_index(layer).map(|index| experts[index].as_slice());
            let made = loader.layer(layer, held);
            store.release();
            made
        };
        let layers = (0..spec.layers).map(layer).collect::<Result<_, _>>()?;
        let final_norm = loader.norm(loader.names.final_norm)?;
        Ok(Self { form, embedding, position_embedding, layers, final_norm, head })
    }

    /// How matrices of experts lie.
    pub(crate) fn expert_form(&self) -> Weights {
        let of = |layer: &LayerWeights| match &layer.ffn {
            LayerFfn::Moe { experts, .. } => Some(experts.chunks.first()?.ffn.up.weight.form),
            LayerFfn::Dense(_) => None,
        };
        self.layers.iter().find_map(of).unwrap_or(self.form)
    }
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize, held: Option<&[ExpertId]>) -> Result<LayerWeights, EngineError> {
        let (norm_1, norm_2) = (self.names.norm_1, self.names.norm_2);
        Ok(LayerWeights {
            norm_1: self.norm(&self.names.of_layer(layer, norm_1))?,
            attention: self.attention(layer)?,
            norm_2: self.norm(&self.names.of_layer(layer, norm_2))?,
            ffn: match (held, self.spec.dense) {
                (Some(held), _) => self.moe(layer, held)?,
                (None, Some(dense)) => LayerFfn::Dense(self.ffn(layer, "mlp", dense)?),
                (None, None) => return Err(EngineError::Internal(format!("layer {layer} has no FFN"))),
            },
        })
    }

    fn moe(&mut self, layer: usize, held: &[ExpertId]) -> Result<LayerFfn, EngineError> {
        let (experts, hidden) = (self.spec.experts, self.spec.hidden);
        let name = self.names.of_layer(layer, self.names.norm_2);
        let (weight, norm_bias) = self.norm_values(&name)?;
        let h = weight.len();
        let mut router = weight;
        router.extend(norm_bias.unwrap_or_else(|| vec![0.0; h]));
        let name = self.names.of_layer(layer, self.names.router);
        router.extend(self.whole(&name, experts, hidden)?.widen(h).values);
        let (biased, corrected) = (self.spec.router.bias, self.spec.router.correction);
        let mut both = vec![0.0; 2 * experts];
        if biased {
            let name = self.names.of_layer(layer, self.names.router_bias);
            both[..experts].copy_from_slice(&self.vector(&name, experts)?.values);
        }
        if corrected {
            let name = self.names.of_layer(layer, self.names.correction);
            both[experts..].copy_from_slice(&self.vector(&name, experts)?.values);
        }
        router.extend(both);
        router.resize(router.len().next_multiple_of(4), 0.0);
        let router = self.gpu.matrix(&name, Weights::F32, bytemuck::pod_collect_to_vec(&router))?;
        let shared = match self.spec.shared {
            None => None,
            Some(shared) => {
                let ffn = self.ffn(layer, self.names.shared, shared.ffn)?;
                let gate = match shared.gated {
                    true => {
                        let name = self.names.of_layer(layer, &format!("{}_gate.weight", self.names.shared));
                        Some(self.matrix(&name, 1, hidden)?)
                    }
                    false => None,
                };
                Some((ffn, gate))
            }
        };
        Ok(LayerFfn::Moe { router, experts: self.experts(layer, held)?, shared })
    }

    fn norm(&mut self, name: &str) -> Result<Norm, EngineError> {
        let (weight, bias) = self.norm_values(name)?;
        let bias = bias.map(|bias| self.upload(name, &bias)).transpose()?;
        Ok(Norm { weight: self.upload(name, &weight)?, bias })
    }

    /// Weight and, where it has one, bias of a norm, padded.
    fn norm_values(&mut self, name: &str) -> Result<(Vec<f32>, Option<Vec<f32>>), EngineError> {
        let (hidden, h) = (self.spec.hidden, 4 * self.spec.h4());
        let weight = self.vector(&format!("{name}.weight"), hidden)?.widen(h).values;
        let bias = match self.spec.norm.centred {
            true => Some(self.vector(&format!("{name}.bias"), hidden)?.widen(h).values),
            false => None,
        };
        Ok((weight, bias))
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Buffer, EngineError> {
        let padded = self.whole(name, rows, columns)?.padded();
        self.upload(name, &padded.values)
    }

    /// Matrices of `height` rows each in the form that matrices are held in.
    pub(super) fn upload_matrix(
        &self,
        name: &str,
        rows: &Rows,
        height: usize,
    ) -> Result<Matrix, EngineError> {
        self.upload_as(self.form, name, rows, height)
    }

    pub(super) fn upload_as(
        &self,
        form: Weights,
        name: &str,
        rows: &Rows,
        height: usize,
    ) -> Result<Matrix, EngineError> {
        self.upload_units(form, name, pack_as(form, name, rows, height)?, (height, rows.columns))
    }

    /// Memory for matrices of (rows, columns), `units` units of all of them.
    pub(super) fn empty_matrix(
        &self,
        name: &str,
        form: Weights,
        units: usize,
        (height, width): (usize, usize),
    ) -> Result<Matrix, EngineError> {
        let buffer = self.gpu.empty_matrix(name, form, units)?;
        Ok(Matrix { buffer, form, height4: height / 4, width4: width / 4, units })
    }

    /// Matrices of (rows, columns) that [`pack_as`] made, one behind the other.
    pub(super) fn upload_units(
        &self,
        form: Weights,
        name: &str,
        units: Vec<pack::Unit>,
        (height, width): (usize, usize),
    ) -> Result<Matrix, EngineError> {
        let count = units.len();
        let buffer = self.gpu.matrix(name, form, units)?;
        Ok(Matrix { buffer, form, height4: height / 4, width4: width / 4, units: count })
    }

    pub(super) fn upload(&self, name: &str, values: &[f32]) -> Result<Buffer, EngineError> {
        self.gpu.buffer_of(name, values)
    }
}

impl<G> Loader<'_, G> {
    /// A vector as one row.
    pub(super) fn vector(&mut self, name: &str, size: usize) -> Result<Rows, EngineError> {
        self.rows(name, &[size], size, 0..size)
    }

    /// A matrix `[rows, columns]`.
    pub(super) fn whole(&mut self, name: &str, rows: usize, columns: usize) -> Result<Rows, EngineError> {
        self.rows(name, &[rows, columns], columns, 0..rows * columns)
    }

    /// Slice `index` along the first axis of a tensor.
    pub(super) fn slice(&mut self, name: &str, shape: &[usize], index: usize) -> Result<Rows, EngineError> {
        let size: usize = shape[1..].iter().product();
        self.rows(name, shape, shape[shape.len() - 1], index * size..(index + 1) * size)
    }

    /// Part `range` of a tensor as rows of `columns` values.
    pub(super) fn rows(
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
}

/// Matrices of `height` rows each as units of a form.
pub(super) fn pack_as(
    form: Weights,
    name: &str,
    rows: &Rows,
    height: usize,
) -> Result<Vec<pack::Unit>, EngineError> {
    let packed = pack::pack(form, &rows.values, pack::Shape { height, columns: rows.columns });
    packed.map_err(|value| {
        let what = format!("{name}: weight {value} is beyond what f16 holds");
        EngineError::usage(what, "use --dtype f32, without --quant")
    })
}

/// How matrices lie on the device.
pub(crate) fn form_of(dtype: Dtype, quant: Option<Quant>) -> Weights {
    match (quant, dtype) {
        (Some(Quant::Q8_0), _) => Weights::Q8,
        (Some(Quant::Q4_0), _) => Weights::Q4,
        (None, Dtype::F16) => Weights::F16,
        (None, Dtype::F32) => Weights::F32,
    }
}

//! Experts, shared experts and dense FFNs: one form on the device for all that stand on disk.

use super::chunks::Chunk;
use super::layers::{Dense, LayerFfn, LayerWeights, Loader, Matrix, ModelWeights, form_of, pack_as};
use super::names::{ExpertForm, Names};
use super::rows::Rows;
use super::{Store, formats, pack};
use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Part};
use crate::model::{FfnSpec, ModelSpec};
use crate::options::{Dtype, Quant};
use exflow_placement::ExpertId;
use exflow_shaders::Weights;

/// The matrices of one or more experts: `up` `[experts, matrices, I, H]`, `down` `[experts, H, I]`, biases likewise.
pub(crate) struct Ffn {
    pub(crate) spec: FfnSpec,
    pub(crate) up: Dense,
    pub(crate) down: Dense,
}

/// The experts of one layer that this rank holds, in ascending order of their ids.
pub(crate) struct Experts {
    /// Local number of each logical expert, by its id.
    pub(crate) local: Vec<Option<u32>>,
    /// Their matrices in order of these numbers, as many experts together as one binding takes.
    pub(crate) chunks: Vec<Chunk>,
}

/// One expert, on its way to the device; gate rows above up rows.
struct Expert {
    up: Rows,
    up_bias: Vec<f32>,
    down: Rows,
    down_bias: Vec<f32>,
}

/// Experts of one layer as they go onto a device, packed, in ascending order of their ids.
pub(crate) struct PackedExperts {
    pub(crate) layer: usize,
    pub(super) ids: Vec<ExpertId>,
    pub(super) ffn: PackedFfn,
}

/// [`Ffn`] before it is on a device.
#[derive(Default)]
pub(super) struct PackedFfn {
    pub(super) form: Weights,
    pub(super) up: Vec<pack::Unit>,
    pub(super) up_bias: Vec<f32>,
    pub(super) down: Vec<pack::Unit>,
    pub(super) down_bias: Vec<f32>,
}

/// Where a rank reads experts from, and in which form it holds them.
#[derive(Clone, Copy)]
pub(crate) struct Shelf<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) store: &'a Store,
    pub(crate) held_as: (Dtype, Option<Quant>),
}

impl<'a> Shelf<'a> {
    pub(super) fn loader<G>(&self, gpu: G, read: &'a mut dyn FnMut(u64)) -> Loader<'a, G> {
        let form = form_of(self.held_as.0, self.held_as.1);
        let (names, rounds) = (Names::of(self.spec), self.held_as.1.is_some());
        Loader { spec: self.spec, names, store: self.store, gpu, form, rounds, read }
    }

    /// Reads experts of a layer of the model, which is a MoE layer; needs no device.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub(crate) fn read(&self, layer: usize, ids: &[ExpertId]) -> Result<PackedExperts, EngineError> {
        let mut ignore = |_| ();
        let ffn = Shelf { ..*self }.loader((), &mut ignore).pack_experts(layer, ids)?;
        self.store.release();
        Ok(PackedExperts { layer, ids: ids.to_vec(), ffn })
    }
}

impl PackedExperts {
    /// Which they are, ascending.
    pub(crate) fn ids(&self) -> &[ExpertId] {
        &self.ids
    }
}

impl Experts {
    /// The chunk that holds an expert, and its number there.
    fn place(&self, expert: ExpertId) -> Option<(&Chunk, usize)> {
        self.place_of(expert).map(|(chunk, at)| (&self.chunks[chunk], at))
    }

    /// The same by the chunk's number.
    pub(super) fn place_of(&self, expert: ExpertId) -> Option<(usize, usize)> {
        let at = self.local[expert.index()]? as usize;
        let holds = |chunk: &Chunk| (chunk.first..chunk.first + chunk.count).contains(&at);
        let chunk = self.chunks.iter().position(holds)?;
        Some((chunk, at - self.chunks[chunk].first))
    }

    /// Which they are, ascending.
    pub(crate) fn ids(&self) -> Vec<ExpertId> {
        let held = self.local.iter().enumerate().filter(|(_, local)| local.is_some());
        held.map(|(expert, _)| ExpertId::from(expert)).collect()
    }
}

impl ModelWeights {
    /// The experts that are here, of each MoE layer, ascending.
    pub(crate) fn held(&self) -> Vec<Vec<ExpertId>> {
        let of = |layer: &LayerWeights| match &layer.ffn {
            LayerFfn::Moe { experts, .. } => Some(experts.ids()),
            LayerFfn::Dense(_) => None,
        };
        self.layers.iter().filter_map(of).collect()
    }

    /// Gives each MoE layer the experts `experts[layer]` in place of those that are here: only those that were not are
    /// read.
    pub(crate) fn replace_experts(
        &mut self,
        shelf: Shelf<'_>,
        gpu: &Gpu,
        experts: &[Vec<ExpertId>],
        read: &mut dyn FnMut(u64),
    ) -> Result<(), EngineError> {
        let spec = shelf.spec;
        let mut loader = shelf.loader(gpu, read);
        for (layer, index) in (0..spec.layers).filter_map(|layer| Some((layer, spec.moe_index(layer)?))) {
            let there = self.experts(layer)?;
            let before = there.ids();
            if before != experts[index] {
                let fresh: Vec<ExpertId> =
                    experts[index].iter().filter(|expert| !before.contains(expert)).copied().collect();
                let fresh = loader.experts(layer, &fresh)?;
                *there = loader.put_together(layer, there, fresh, &experts[index])?;
            }
        }
        gpu.forget_bindings();
        Ok(())
    }

    pub(super) fn experts(&mut self, layer: usize) -> Result<&mut Experts, EngineError> {
        match self.layers.get_mut(layer).map(|layer| &mut layer.ffn) {
            Some(LayerFfn::Moe { experts, .. }) => Ok(experts),
            _ => Err(EngineError::Internal(format!("layer {layer} has no experts"))),
        }
    }
}

impl Loader<'_> {
    pub(super) fn experts(&mut self, layer: usize, held: &[ExpertId]) -> Result<Experts, EngineError> {
        let label = self.names.of_layer(layer, self.names.moe);
        let mut chunks = Vec::new();
        for (first, ids) in self.cut(layer, held) {
            chunks.push(Chunk { first, count: ids.len(), ffn: self.chunk(&label, layer, ids)? });
        }
        Ok(Experts { local: self.numbers(held), chunks })
    }

    /// Local number of each logical expert, where these are held.
    pub(super) fn numbers(&self, held: &[ExpertId]) -> Vec<Option<u32>> {
        let mut local = vec![None; self.spec.experts];
        for (index, expert) in held.iter().enumerate() {
            local[expert.index()] = Some(index as u32);
        }
        local
    }

    /// The experts `now`, each of which is `there` or `fresh`: copied on the device, where some of them were there.
    fn put_together(
        &self,
        layer: usize,
        there: &Experts,
        fresh: Experts,
        now: &[ExpertId],
    ) -> Result<Experts, EngineError> {
        if fresh.ids() == now {
            return Ok(fresh);
        }
        let label = self.names.of_layer(layer, self.names.moe);
        let source = |&expert: &ExpertId| fresh.place(expert).or_else(|| there.place(expert));
        let sources: Vec<_> = now.iter().filter_map(source).collect();
        let mut chunks = Vec::new();
        for (first, sources) in self.cut(layer, &sources) {
            let gather = |of: fn(&Ffn) -> &Dense| self.gather(&label, sources, of);
            let (up, down) = (gather(|ffn| &ffn.up)?, gather(|ffn| &ffn.down)?);
            chunks.push(Chunk { first, count: sources.len(), ffn: Ffn { spec: self.spec.expert, up, down } });
        }
        Ok(Experts { local: self.numbers(now), chunks })
    }

    /// The matrices of experts one behind the other; each is one of a chunk's, by its number there.
    fn gather(
        &self,
        label: &str,
        sources: &[(&Chunk, usize)],
        of: fn(&Ffn) -> &Dense,
    ) -> Result<Dense, EngineError> {
        let cut = |buffer, units: usize, count, at| Part {
            of: buffer,
            first: units / count * at,
            units: units / count,
        };
        let weights = sources.iter().map(|&(chunk, at)| {
            let weight = &of(&chunk.ffn).weight;
            cut(&weight.buffer, weight.units, chunk.count, at)
        });
        let weights: Vec<Part<'_>> = weights.collect();
        let biases = sources.iter().filter_map(|&(chunk, at)| {
            let bias = of(&chunk.ffn).bias.as_ref()?;
            Some(cut(bias, (bias.bytes() / 16) as usize, chunk.count, at))
        });
        let biases: Vec<Part<'_>> = biases.collect();
        let like = sources.first().map(|(chunk, _)| of(&chunk.ffn).weight.clone());
        let like =
            like.ok_or_else(|| EngineError::Internal(format!("{label}: no experts to put together")))?;
        let units = weights.iter().map(|part| part.units).sum();
        let weight = Matrix { buffer: self.gpu.gather(label, &weights, Some(like.form))?, units, ..like };
        let bias = match biases.is_empty() {
            true => None,
            false => Some(self.gpu.gather(label, &biases, None)?),
        };
        Ok(Dense { weight, bias })
    }

    /// A dense layer's FFN or a shared expert, under `part`.
    pub(super) fn ffn(&mut self, layer: usize, part: &str, spec: FfnSpec) -> Result<Ffn, EngineError> {
        let under = self.names.of_layer(layer, part);
        let names = ["gate_proj", "up_proj", "down_proj"].map(|name| format!("{under}.{name}.weight"));
        let packed = self.pack_ffn(&under, spec, self.form, 1, |loader, _| loader.three(&names, spec))?;
        self.upload_ffn(&under, spec, packed)
    }

    pub(super) fn upload_ffn(
        &self,
        label: &str,
        spec: FfnSpec,
        packed: PackedFfn,
    ) -> Result<Ffn, EngineError> {
        let (h, i) = (4 * self.spec.h4(), 4 * spec.i4());
        let bias = |values: Vec<f32>| -> Result<Option<Buffer>, EngineError> {
            if spec.bias { self.gpu.buffer_of(label, &values).map(Some) } else { Ok(None) }
        };
        Ok(Ffn {
            spec,
            up: Dense {
                weight: self.upload_units(packed.form, label, packed.up, (i, h))?,
                bias: bias(packed.up_bias)?,
            },
            down: Dense {
                weight: self.upload_units(packed.form, label, packed.down, (h, i))?,
                bias: bias(packed.down_bias)?,
            },
        })
    }
}

impl<G> Loader<'_, G> {
    pub(super) fn pack_experts(&mut self, layer: usize, ids: &[ExpertId]) -> Result<PackedFfn, EngineError> {
        let label = self.names.of_layer(layer, self.names.moe);
        let read = |loader: &mut Self, index: usize| loader.expert(layer, ids[index].index());
        self.pack_ffn(&label, self.spec.expert, self.expert_form(layer), ids.len(), read)
    }

    /// How a layer's experts are held: as they are published where that is MXFP4 and nobody asked for another rounding.
    pub(super) fn expert_form(&self, layer: usize) -> Weights {
        let blocks = format!("{}.experts.gate_up_proj_blocks", self.names.of_layer(layer, self.names.moe));
        let packed = self.names.experts == ExpertForm::GptOss && !self.rounds && self.store.has(&blocks);
        if packed { Weights::Mx4 } else { self.form }
    }

    fn expert(&mut self, layer: usize, expert: usize) -> Result<Expert, EngineError> {
        let (spec, hidden) = (self.spec.expert, self.spec.hidden);
        let (inner, count) = (spec.intermediate, self.spec.experts);
        let under = self.names.of_layer(layer, self.names.moe);
        let none = Vec::new();
        match self.names.experts {
            ExpertForm::Stacked => Ok(Expert {
                up: self.slice(&format!("{under}.w1"), &[count, inner, hidden], expert)?,
                up_bias: self.slice(&format!("{under}.b1"), &[count, inner], expert)?.values,
                down: self.slice(&format!("{under}.w2"), &[count, hidden, inner], expert)?,
                down_bias: self.slice(&format!("{under}.b2"), &[count, hidden], expert)?.values,
            }),
            ExpertForm::Granite => Ok(Expert {
                up: self.slice(
                    &format!("{under}.input_linear.weight"),
                    &[count, 2 * inner, hidden],
                    expert,
                )?,
                down: self.slice(
                    &format!("{under}.output_linear.weight"),
                    &[count, hidden, inner],
                    expert,
                )?,
                up_bias: none.clone(),
                down_bias: none,
            }),
            ExpertForm::Each => {
                let fused = format!("{under}.experts.gate_up_proj");
                if self.store.has(&fused) {
                    let down = format!("{under}.experts.down_proj");
                    return Ok(Expert {
                        up: self.slice(&fused, &[count, 2 * inner, hidden], expert)?,
                        down: self.slice(&down, &[count, hidden, inner], expert)?,
                        up_bias: none.clone(),
                        down_bias: none,
                    });
                }
                let names = self.names.ffn.map(|name| format!("{under}.experts.{expert}.{name}.weight"));
                self.three(&names, spec)
            }
            ExpertForm::GptOss => self.gpt_oss(&format!("{under}.experts"), expert),
        }
    }

    fn three(&mut self, [gate, up, down]: &[String; 3], spec: FfnSpec) -> Result<Expert, EngineError> {
        let (hidden, inner) = (self.spec.hidden, spec.intermediate);
        let (gate, up) = (self.whole(gate, inner, hidden)?, self.whole(up, inner, hidden)?);
        let down = self.whole(down, hidden, inner)?;
        Ok(Expert { up: gate.above(up), down, up_bias: Vec::new(), down_bias: Vec::new() })
    }

    fn gpt_oss(&mut self, under: &str, expert: usize) -> Result<Expert, EngineError> {
        let (hidden, inner, count) = (self.spec.hidden, self.spec.expert.intermediate, self.spec.experts);
        let blocks = self.store.has(&format!("{under}.gate_up_proj_blocks"));
        let (mixed, down) = if blocks {
            (
                self.mxfp4(&format!("{under}.gate_up_proj"), [count, 2 * inner, hidden], expert)?,
                self.mxfp4(&format!("{under}.down_proj"), [count, hidden, inner], expert)?,
            )
        } else {
            (
                self.slice(&format!("{under}.gate_up_proj"), &[count, hidden, 2 * inner], expert)?
                    .transposed(),
                self.slice(&format!("{under}.down_proj"), &[count, inner, hidden], expert)?.transposed(),
            )
        };
        let bias = self.slice(&format!("{under}.gate_up_proj_bias"), &[count, 2 * inner], expert)?.cut(1);
        let apart = || (0..2 * inner).step_by(2).chain((1..2 * inner).step_by(2));
        Ok(Expert {
            up: mixed.take(apart()),
            up_bias: bias.take(apart()).values,
            down,
            down_bias: self.slice(&format!("{under}.down_proj_bias"), &[count, hidden], expert)?.values,
        })
    }

    /// One expert's matrix out of `{name}_blocks` `[E, N, K/32, 16]` and `{name}_scales` `[E, N, K/32]`.
    fn mxfp4(&mut self, name: &str, [count, n, k]: [usize; 3], expert: usize) -> Result<Rows, EngineError> {
        if !k.is_multiple_of(32) {
            let what = format!("{name}_blocks come in rows of 32 values, config.json says {k}");
            return Err(EngineError::usage(what, "use the config.json that belongs to these weights"));
        }
        let size = n * k / 32;
        let blocks = self.store.read_bytes(
            &format!("{name}_blocks"),
            &[count, n, k / 32, 16],
            expert * size * 16..(expert + 1) * size * 16,
        )?;
        let scales = self.store.read_bytes(
            &format!("{name}_scales"),
            &[count, n, k / 32],
            expert * size..(expert + 1) * size,
        )?;
        (self.read)((n * k) as u64);
        // A scale may be no number (255), or so large that its products are none.
        let values = formats::mxfp4(blocks, scales);
        let values = self.store.finite(&format!("{name}_scales"), expert * n * k, values)?;
        Ok(Rows { values, columns: k })
    }

    /// `count` experts, each read and packed before the next one: a layer of them in f32 may be more than what it becomes.
    fn pack_ffn(
        &mut self,
        label: &str,
        spec: FfnSpec,
        form: Weights,
        count: usize,
        read: impl Fn(&mut Self, usize) -> Result<Expert, EngineError>,
    ) -> Result<PackedFfn, EngineError> {
        let (h, i, inner) = (4 * self.spec.h4(), 4 * spec.i4(), spec.intermediate);
        let mut all = PackedFfn { form, ..PackedFfn::default() };
        let hidden = self.spec.hidden;
        for index in 0..count {
            let expert = read(self, index)?;
            let size = |packed: &Vec<_>| if index == 0 { packed.len() * count } else { 0 };
            let packed = pack_as(form, label, &expert.up.widen(h).lengthen(inner, i), i)?;
            all.up.reserve_exact(size(&packed));
            all.up.extend(packed);
            let packed = pack_as(form, label, &expert.down.widen(i).lengthen(hidden, h), h)?;
            all.down.reserve_exact(size(&packed));
            all.down.extend(packed);
            if spec.bias {
                all.up_bias.extend(Rows { values: expert.up_bias, columns: inner }.widen(i).values);
                all.down_bias.extend(Rows { values: expert.down_bias, columns: hidden }.widen(h).values);
            }
        }
        Ok(all)
    }
}

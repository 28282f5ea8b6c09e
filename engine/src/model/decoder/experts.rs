//! Experts, the shared expert and dense FFNs: lists of (row, expert) pairs through two matrices.

use super::Decoder;
use crate::gpu::{Buffer, Recording};
use crate::weights::{Chunk, Ffn, LayerFfn, Matrix};
use exflow_shaders::{Kernel, Variant, params};

/// Pairs and tiles of one expert launch within the lists on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertBatch {
    /// First of the pairs.
    pub(crate) first_pair: usize,
    pub(crate) pairs: usize,
    pub(crate) first_tile: usize,
    pub(crate) tiles: usize,
    pub(crate) variant: Variant,
}

/// Which FFN of a layer a batch is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LocalFfn {
    /// The experts of this rank.
    Experts,
    /// The one that every token takes: a shared expert or a dense layer's.
    Every,
}

impl Decoder {
    /// The number on this device of a logical expert of a MoE layer, if it is here.
    pub(crate) fn local_expert(&self, layer: usize, expert: usize) -> Option<u32> {
        match &self.layer(layer).ffn {
            LayerFfn::Moe { experts, .. } => experts.local.get(expert).copied().flatten(),
            LayerFfn::Dense(_) => None,
        }
    }

    /// All experts of a layer that is whole on this device, from the router's choice to partials, sized on the
    /// device itself.
    pub(crate) fn all_experts(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        let (LayerFfn::Moe { experts, .. }, Some(index)) = (&self.layer(layer).ffn, spec.moe_index(layer))
        else {
            return;
        };
        let pairs = rows * spec.top_k;
        let variant = self.expert_variant(rows);
        let [(up_variant, up_groups), (down_variant, down_groups)] = self.ffn_cuts(variant, spec.expert.i4());
        // Of a single row the router wrote the lists.
        if rows > 1 {
            let p = params::ExpertPermute {
                pairs: pairs as u32,
                top_k: spec.top_k as u32,
                experts: spec.experts as u32,
                up_groups,
                down_groups,
            };
            let lists = [&s.chosen[index], &s.weights[index], &s.pairs_list, &s.tiles, &s.launches];
            r.launch(Kernel::ExpertPermute, variant, &p, &lists, [1, 1, 1]);
        }
        for Chunk { first, count, ffn } in &experts.chunks {
            let (up, down) = self.ffn_params(ffn, 0, (*first, *count));
            r.launch_indirect(Kernel::ExpertUp, up_variant, &up, &self.up_buffers(ffn), (&s.launches, 0));
            let buffers = self.down_buffers(ffn);
            r.launch_indirect(Kernel::ExpertDown, down_variant, &down, &buffers, (&s.launches, 12));
        }
    }

    /// The variant for a layer's experts, which `rows` rows choose among.
    pub(super) fn expert_variant(&self, rows: usize) -> Variant {
        let spec = &self.spec;
        // Several rows may share an expert, however many experts there are.
        let each = (rows * spec.top_k / spec.experts.max(1)).max(usize::from(rows > 1));
        Variant { activation: spec.expert.activation, ..self.expert_cut().each(each) }
    }

    /// Workgroups along the columns of the experts' two launches.
    pub(super) fn expert_groups(&self, variant: Variant) -> [u32; 2] {
        self.ffn_cuts(variant, self.spec.expert.i4()).map(|of| of.1)
    }

    /// The variants of the two launches, and their workgroups along the columns.
    fn ffn_cuts(&self, variant: Variant, i4: usize) -> [(Variant, u32); 2] {
        let of = |(kernel, n4)| self.gpu.along(kernel, variant, n4);
        [(Kernel::ExpertUp, i4), (Kernel::ExpertDown, self.spec.h4())].map(of)
    }

    /// A batch of uploaded pairs and tiles through an FFN of the layer.
    pub(crate) fn ffn(&self, r: &mut Recording<'_>, layer: usize, which: LocalFfn, batch: ExpertBatch) {
        let (ffn, gate) = match (&self.layer(layer).ffn, which) {
            (LayerFfn::Moe { experts, .. }, LocalFfn::Experts) => {
                for Chunk { first, count, ffn } in &experts.chunks {
                    self.ffn_of(r, ffn, (*first, *count), batch);
                }
                return;
            }
            (LayerFfn::Moe { shared: Some((ffn, gate)), .. }, LocalFfn::Every) => (ffn, gate.as_ref()),
            (LayerFfn::Dense(ffn), LocalFfn::Every) => (ffn, None),
            _ => return,
        };
        if let Some(gate) = gate {
            let (h4, first, count) = (self.spec.h4() as u32, batch.first_pair as u32, batch.pairs as u32);
            let p = params::SharedGate { h4, first, count };
            let groups = [self.columns(batch.pairs), 1, 1];
            let buffers = [&self.scratch.normed, gate, &self.scratch.pairs_list];
            r.launch(Kernel::SharedGate, Variant::default(), &p, &buffers, groups);
        }
        self.ffn_of(r, ffn, (0, 1), batch);
    }

    /// The tiles of a batch that are of experts (the first, how many) whose matrices these are.
    fn ffn_of(&self, r: &mut Recording<'_>, ffn: &Ffn, experts: (usize, usize), batch: ExpertBatch) {
        let variant =
            Variant { activation: ffn.spec.activation, weights: ffn.up.weight.form, ..batch.variant };
        let (up, down) = self.ffn_params(ffn, batch.first_tile, experts);
        let tiles = batch.tiles as u32;
        let [(up_variant, up_groups), (down_variant, down_groups)] = self.ffn_cuts(variant, ffn.spec.i4());
        r.launch(Kernel::ExpertUp, up_variant, &up, &self.up_buffers(ffn), [tiles, up_groups, 1]);
        let buffers = self.down_buffers(ffn);
        r.launch(Kernel::ExpertDown, down_variant, &down, &buffers, [tiles, down_groups, 1]);
    }

    fn ffn_params(
        &self,
        ffn: &Ffn,
        first_tile: usize,
        (first, count): (usize, usize),
    ) -> (params::ExpertUp, params::ExpertDown) {
        let (first_expert, experts) = (first as u32, count as u32);
        let (h4, i4, first_tile) = (self.spec.h4() as u32, ffn.spec.i4() as u32, first_tile as u32);
        let has_bias = u32::from(ffn.spec.bias);
        let scale = self.spec.residual_scale;
        let units = |matrix: &Matrix, k4: u32| {
            let (units, stride) = matrix.form.units(4 * k4 as usize);
            (units as u32, stride as u32)
        };
        let (w_units, w_stride) = units(&ffn.up.weight, h4);
        let limit = ffn.spec.limit;
        let up = params::ExpertUp {
            h4,
            i4,
            w_units,
            w_stride,
            first_tile,
            has_bias,
            first_expert,
            experts,
            limit,
        };
        let (w_units, w_stride) = units(&ffn.down.weight, i4);
        (
            up,
            params::ExpertDown {
                i4,
                h4,
                w_units,
                w_stride,
                first_tile,
                has_bias,
                first_expert,
                experts,
                scale,
            },
        )
    }

    fn up_buffers<'a>(&'a self, ffn: &'a Ffn) -> [&'a Buffer; 6] {
        let s = &self.scratch;
        let bias = ffn.up.bias.as_ref().unwrap_or(self.absent());
        [&s.normed, &ffn.up.weight.buffer, &s.pairs_list, &s.tiles, bias, &s.inner]
    }

    fn down_buffers<'a>(&'a self, ffn: &'a Ffn) -> [&'a Buffer; 6] {
        let s = &self.scratch;
        let bias = ffn.down.bias.as_ref().unwrap_or(self.absent());
        [&s.inner, &ffn.down.weight.buffer, &s.pairs_list, &s.tiles, bias, &s.partials]
    }
}

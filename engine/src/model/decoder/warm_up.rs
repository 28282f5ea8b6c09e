//! Steps that do nothing: they have the device make every kernel that a step of any size launches, so that no token waits
//! for one. On lavapipe a kernel takes 5 to 60 ms, and which ones a step launches depends on how many rows it has.

use super::{Decoder, ExpertBatch, LocalFfn};
use crate::EngineError;
use crate::gpu::{EXPERT_ROWS, LINEAR_ROWS, Recording};
use exflow_shaders::{ATTENTION_SPLIT, KV_BLOCK};

impl Decoder {
    /// Makes the kernels for steps of any number of rows. `shares`: other ranks have experts too, and this one's are sized
    /// by the host.
    pub(crate) fn warm_up(&self, shares: bool) -> Result<(), EngineError> {
        let mut r = Recording::without_work(&self.gpu);
        self.scratch.has_draws.set(self.gpu.draws());
        let of_experts = EXPERT_ROWS.map(|each| (each * self.spec.experts).div_ceil(self.spec.top_k.max(1)));
        for rows in LINEAR_ROWS.into_iter().chain(of_experts) {
            self.warm_up_step(&mut r, rows, shares);
        }
        self.scratch.has_draws.set(false);
        let each = || std::iter::once(0).chain(EXPERT_ROWS);
        for (layer, each) in (0..self.spec.layers).flat_map(|layer| each().map(move |each| (layer, each))) {
            let pairs = ExpertBatch {
                first_pair: 0,
                pairs: 1,
                first_tile: 0,
                tiles: 1,
                variant: self.cut().each(each),
            };
            self.ffn(&mut r, layer, LocalFfn::Every, pairs);
            self.ffn(
                &mut r,
                layer,
                LocalFfn::Experts,
                ExpertBatch { variant: self.expert_cut().each(each), ..pairs },
            );
        }
        r.submit()?;
        self.gpu.take_made();
        Ok(())
    }

    /// What a step launches besides experts.
    fn warm_up_step(&self, r: &mut Recording<'_>, rows: usize, shares: bool) {
        // A context of one split and one of several are attended to in different ways.
        let contexts = [1, ATTENTION_SPLIT / KV_BLOCK + 1];
        self.embed(r, rows, false);
        for layer in 0..self.spec.layers {
            if shares {
                self.append_arrived(r, layer, rows);
            }
            self.attend(r, layer, rows, contexts[0]);
            self.scores(r, layer, rows, contexts[1]);
            if self.spec.moe_index(layer).is_some() {
                self.route(r, layer, rows);
            }
            if !shares {
                self.all_experts(r, layer, rows);
            }
            self.combine(r, layer, rows);
        }
        self.head(r, rows, rows);
    }
}

//! The launches of a decoder, in the order in which a token passes them. Exchanges are not its business: the
//! runtime calls these between them.

mod attention;
mod experts;
mod pieces;
mod warm_up;

pub(crate) use experts::{ExpertBatch, LocalFfn};
pub(crate) use pieces::Piece;

use crate::EngineError;
use crate::gpu::{Buffer, Cut, Gpu, Recording};
use crate::model::ModelSpec;
use crate::model::scratch::{Remade, Scratch};
use crate::weights::{Dense, LayerFfn, LayerWeights, Matrix, ModelWeights, Norm};
use exflow_shaders::params::score;
use exflow_shaders::{Cache, Kernel, Variant, params};

/// One rank's part of a model, on its device.
pub(crate) struct Decoder {
    pub(crate) gpu: Gpu,
    pub(crate) spec: ModelSpec,
    pub(crate) weights: ModelWeights,
    pub(crate) scratch: Scratch,
    /// Per layer `[slots]` of keys and values.
    pub(crate) cache: Vec<Buffer>,
    cache_slots: usize,
    /// How the cache holds them.
    pub(crate) cache_form: Cache,
    /// Where keys and values of other ranks come as their layers' inputs: what they are made anew in.
    pub(crate) remade: Option<Remade>,
}

impl Decoder {
    pub(crate) fn new(
        gpu: Gpu,
        spec: ModelSpec,
        weights: ModelWeights,
        (cache_slots, cache_form): (usize, Cache),
    ) -> Result<Self, EngineError> {
        let scratch = Scratch::new(&gpu, &spec)?;
        let mut decoder =
            Self { gpu, spec, weights, scratch, cache: Vec::new(), cache_slots: 0, cache_form, remade: None };
        decoder.size_cache(cache_slots)?;
        Ok(decoder)
    }

    /// Makes the cache anew where it has not `slots` positions; what it held is lost.
    pub(crate) fn size_cache(&mut self, slots: usize) -> Result<(), EngineError> {
        if self.cache_slots == slots {
            return Ok(());
        }
        self.cache.clear();
        let words = (slots * self.cache_form.stride(4 * self.spec.attention.cache4())) as u64;
        let texel = self.cache_form.texel_words();
        let cache = (0..self.spec.layers).map(|_| self.gpu.cache("KV cache", words, texel));
        self.cache = cache.collect::<Result<_, _>>()?;
        self.cache_slots = slots;
        Ok(())
    }

    /// Has keys and values of other ranks made anew from their layers' inputs, or taken as they come.
    pub(crate) fn remake(&mut self, on: bool) -> Result<(), EngineError> {
        match (on, &self.remade) {
            (true, None) => self.remade = Some(Remade::new(&self.gpu, &self.spec)?),
            (false, Some(_)) => self.remade = None,
            _ => {}
        }
        Ok(())
    }

    /// Elements of the cache's rows that lie together for all rows of a block: those of a head's keys or values, or whole rows where the
    /// two are of different sizes, in one, or with scales behind them.
    pub(crate) fn cache_part4(&self) -> usize {
        let (of, form) = (&self.spec.attention, self.cache_form);
        let alike = of.latent.is_none() && of.d4() == of.v4() && form != Cache::Q8;
        if alike { of.d4() } else { form.stride(4 * of.cache4()) / form.texel_words() as usize }
    }

    /// How keys and values travel: values of a token and layer, and their form.
    pub(crate) fn kv_wire(&self) -> (usize, Cache) {
        match &self.remade {
            Some(_) => (self.spec.hidden, Cache::F32),
            None => (4 * self.spec.attention.cache4(), self.cache_form),
        }
    }

    /// Makes sure that a step of `rows` rows fits, `heads` of which the head is asked for. Call before a step:
    /// contents are lost.
    pub(crate) fn reserve(&mut self, rows: usize, heads: usize) -> Result<(), EngineError> {
        self.scratch.reserve(&self.gpu, &self.spec, rows, heads).map(|_| ())
    }

    /// How this rank's shared experts and dense FFNs are worked on.
    pub(crate) fn cut(&self) -> Cut<'_> {
        self.gpu.cut(self.weights.form)
    }

    /// How this rank's experts are.
    pub(crate) fn expert_cut(&self) -> Cut<'_> {
        self.gpu.cut(self.weights.expert_form())
    }

    pub(crate) fn record(&self) -> Recording<'_> {
        Recording::new(&self.gpu)
    }

    /// Workgroups along `width4` columns of vec4s.
    fn columns(&self, width4: usize) -> u32 {
        (width4 as u32).div_ceil(self.gpu.workgroup())
    }

    fn layer(&self, layer: usize) -> &LayerWeights {
        &self.weights.layers[layer]
    }

    /// Stands for a binding that a launch does not read.
    fn absent(&self) -> &Buffer {
        &self.weights.final_norm.weight
    }

    /// `x = wte[token] * scale (+ wpe[position])`, rows `0..rows`, and the norm before the first layer's attention. The tokens are
    /// the ones that were uploaded, or, where the rows follow those of the step before, the ones that it sampled.
    pub(crate) fn embed(&self, r: &mut Recording<'_>, rows: usize, follows: bool) {
        let (s, w) = (&self.scratch, &self.weights);
        let groups = [self.columns(self.spec.h4()), rows as u32, 1];
        let positions = w.position_embedding.as_ref().unwrap_or(self.absent());
        for chunk in &w.embedding {
            let weight = &chunk.rows.weight;
            let p = params::Embed {
                rows: rows as u32,
                width4: self.spec.h4() as u32,
                first: chunk.first as u32,
                height4: weight.height4 as u32,
                has_positions: u32::from(w.position_embedding.is_some()),
                follows: u32::from(follows),
                scale: self.spec.embedding_scale,
            };
            let buffers = [&s.tokens, &weight.buffer, positions, &s.sampled, s.x()];
            r.launch(Kernel::Embed, Variant::default(), &p, &buffers, groups);
        }
        self.norm(r, self.next_norm(None), (0, rows));
    }

    /// The norm before the FFN, of rows `first..first + rows`. Before a router there is no need of it.
    pub(crate) fn norm_ffn(&self, r: &mut Recording<'_>, layer: usize, first: usize, rows: usize) {
        self.norm(r, &self.layer(layer).norm_2, (first, rows));
    }

    /// The norm before a MoE layer's FFN and the router's choice, for rows `0..rows`; of a single one also its pairs.
    pub(crate) fn route(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let (LayerFfn::Moe { router, .. }, Some(index)) =
            (&self.layer(layer).ffn, self.spec.moe_index(layer))
        else {
            return;
        };
        let (s, spec, of) = (&self.scratch, &self.spec, &self.spec.router);
        let (groups, groups_kept, group_best) = of.groups.unwrap_or((1, 1, 1));
        let (kind, threshold) = match of.score {
            crate::model::Score::Softmax => (score::SOFTMAX, 0.0),
            crate::model::Score::SoftmaxOfChosen => (score::SOFTMAX_OF_CHOSEN, 0.0),
            crate::model::Score::Sigmoid => (score::SIGMOID, 0.0),
            crate::model::Score::Sparsemixer(threshold) => (score::SPARSEMIXER, threshold),
        };
        let [up_groups, down_groups] = self.expert_groups(self.expert_variant(rows));
        let p = params::Router {
            width: spec.hidden as u32,
            h4: spec.h4() as u32,
            centred: u32::from(spec.norm.centred),
            eps: spec.norm.eps,
            experts: spec.experts as u32,
            top_k: spec.top_k as u32,
            score: kind,
            renormalise: u32::from(of.renormalise),
            has_bias: u32::from(of.bias),
            has_correction: u32::from(of.correction),
            groups: groups as u32,
            groups_kept: groups_kept as u32,
            group_best: group_best as u32,
            scale: of.scale,
            threshold,
            lists: u32::from(rows == 1),
            up_groups,
            down_groups,
        };
        let (pairs, tiles, launches) = (&s.pairs_list, &s.tiles, &s.launches);
        let (chosen, weights) = (&s.chosen[index], &s.weights[index]);
        let buffers = [router, chosen, weights, pairs, tiles, launches, s.x(), &s.normed];
        r.launch(Kernel::Router, self.lanes(), &p, &buffers, [rows as u32, 1, 1]);
    }

    /// The residual stream after a layer: each row's residual plus its partials, in router order; and the norm
    /// that comes next.
    pub(crate) fn combine(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let s = &self.scratch;
        let slots = match self.spec.moe_index(layer) {
            Some(_) => (&s.slots, self.spec.partials()),
            None => (&s.dense_slots, 1),
        };
        self.combine_from(r, &s.source, slots, self.next_norm(Some(layer)), rows);
    }

    /// Head and choice, greedy or drawn as `draws` says, of the `rows` rows that `head_rows` names, of `all` rows that left the last layer.
    pub(crate) fn head(&self, r: &mut Recording<'_>, rows: usize, all: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        // Where all are asked for, they are normed already.
        if rows < all {
            self.combine_from(r, &s.head_rows, (&s.slots, 0), &self.weights.final_norm, rows);
        }
        self.logits(r, rows);
        let p = params::Argmax { vocab: spec.vocab_size as u32, stride: 4 * spec.v4() as u32 };
        for (part, rows) in s.head_parts(rows) {
            let (groups, [logits, sampled]) = ([rows as u32, 1, 1], [&part.logits, &part.sampled]);
            r.launch(Kernel::Argmax, self.lanes(), &p, &[logits, sampled], groups);
            if s.has_draws.get() {
                let p = params::Sample { vocab: p.vocab, stride: p.stride };
                r.launch(Kernel::Sample, Variant::default(), &p, &[logits, &part.draws, sampled], groups);
            }
        }
    }

    /// Has the logits of `rows` rows read back; returns in how many read-backs.
    pub(crate) fn read_logits(&self, r: &mut Recording<'_>, rows: usize) -> usize {
        let parts = self.scratch.head_parts(rows);
        parts.map(|(part, rows)| r.read::<f32>(&part.logits, 0, rows * 4 * self.spec.v4())).count()
    }

    /// The logits of `rows` normed rows: chunks of the head make stretches of them.
    fn logits(&self, r: &mut Recording<'_>, rows: usize) {
        let h4 = self.spec.h4();
        for (rows_part, rows) in self.scratch.head_parts(rows) {
            for chunk in &self.weights.head {
                let product = Product { scale: self.spec.logit_scale, ..Product::of(&chunk.rows) };
                let part = Part { stride4: self.spec.v4(), offset4: chunk.first / 4, head4: 0 };
                let to = (&rows_part.logits, chunk.rows.weight.height4, part);
                self.linear_parts(r, product, (&rows_part.normed, h4, h4, 0), to, 1, rows);
            }
        }
    }

    /// The norm behind a layer, or behind the embedding: before the next attention, or before the head.
    fn next_norm(&self, layer: Option<usize>) -> &Norm {
        let next = self.weights.layers.get(layer.map_or(0, |layer| layer + 1));
        next.map_or(&self.weights.final_norm, |next| &next.norm_1)
    }

    /// The norm of rows of the residual stream, (the first, how many).
    fn norm(&self, r: &mut Recording<'_>, norm: &Norm, (first, rows): (usize, usize)) {
        let p = params::Norm { first_row: first as u32, ..self.norm_params() };
        let (absent, s) = (self.absent(), &self.scratch);
        self.launch_norm(r, &p, [absent; 4], norm, (s.x(), &s.normed), rows);
    }

    /// `rows` rows of the residual stream from the rows that `source` names and partials, with their norm.
    fn combine_from(
        &self,
        r: &mut Recording<'_>,
        source: &Buffer,
        (slots, partials): (&Buffer, usize),
        norm: &Norm,
        rows: usize,
    ) {
        let s = &self.scratch;
        let p = params::Norm { combines: 1, top_k: partials as u32, ..self.norm_params() };
        self.launch_norm(r, &p, [s.x(), source, slots, &s.partials], norm, (s.x_next(), &s.normed), rows);
        s.swap();
    }

    /// The norm before a layer's attention, of rows that came from elsewhere.
    fn norm_arrived(&self, r: &mut Recording<'_>, layer: usize, remade: &Remade, rows: usize) {
        let (absent, to) = (self.absent(), (&remade.x, &remade.normed));
        self.launch_norm(r, &self.norm_params(), [absent; 4], &self.layer(layer).norm_1, to, rows);
    }

    fn norm_params(&self) -> params::Norm {
        params::Norm {
            width: self.spec.hidden as u32,
            width4: self.spec.h4() as u32,
            first_row: 0,
            combines: 0,
            top_k: 0,
            centred: u32::from(self.spec.norm.centred),
            eps: self.spec.norm.eps,
        }
    }

    fn launch_norm(
        &self,
        r: &mut Recording<'_>,
        p: &params::Norm,
        [before, source, slots, partials]: [&Buffer; 4],
        norm: &Norm,
        (x, normed): (&Buffer, &Buffer),
        rows: usize,
    ) {
        let bias = norm.bias.as_ref().unwrap_or(self.absent());
        let buffers = [before, source, slots, partials, &norm.weight, bias, x, normed];
        r.launch(Kernel::Norm, self.lanes(), p, &buffers, [rows as u32, 1, 1]);
    }

    /// The variant of kernels with a workgroup for each row: eight lanes on a CPU, whose vector they are.
    fn lanes(&self) -> Variant {
        Variant { subgroup: self.gpu.is_cpu(), ..Variant::default() }
    }

    /// The product of whole rows.
    fn linear(
        &self,
        r: &mut Recording<'_>,
        product: Product<'_>,
        (x, k4): (&Buffer, usize),
        (y, n4): (&Buffer, usize),
        rows: usize,
    ) {
        self.linear_parts(
            r,
            product,
            (x, k4, k4, 0),
            (y, n4, Part { stride4: n4, offset4: 0, head4: 0 }),
            1,
            rows,
        );
    }

    /// The product of parts of rows, head by head: `x` is (buffer, K, stride, from head to head) in vec4s, `y`
    /// (buffer, N, where it goes).
    fn linear_parts(
        &self,
        r: &mut Recording<'_>,
        product: Product<'_>,
        (x, k4, x_stride4, x_head4): (&Buffer, usize, usize, usize),
        (y, n4, part): (&Buffer, usize, Part),
        heads: usize,
        rows: usize,
    ) {
        let variant = self.gpu.cut(product.weight.form).linear(rows);
        let p = params::Linear {
            x_stride4: x_stride4 as u32,
            x_head4: x_head4 as u32,
            y_stride4: part.stride4 as u32,
            y_offset4: part.offset4 as u32,
            y_head4: part.head4 as u32,
            ..product.of_rows(k4, n4, rows)
        };
        let absent = self.absent();
        let (bias, residual) = (product.bias.unwrap_or(absent), product.residual.unwrap_or(absent));
        let (variant, across) = self.gpu.along(Kernel::Linear, variant, n4);
        let groups = [rows.div_ceil(variant.tile_rows()) as u32, across, heads as u32];
        r.launch(Kernel::Linear, variant, &p, &[x, &product.weight.buffer, bias, residual, y], groups);
    }
}

/// A matrix with what is done to its product.
#[derive(Clone, Copy)]
struct Product<'a> {
    weight: &'a Matrix,
    bias: Option<&'a Buffer>,
    residual: Option<&'a Buffer>,
    scale: f32,
}

impl<'a> Product<'a> {
    fn of(dense: &'a Dense) -> Self {
        Self { weight: &dense.weight, bias: dense.bias.as_ref(), residual: None, scale: 1.0 }
    }

    /// The parameters of a product of whole rows.
    fn of_rows(&self, k4: usize, n4: usize, rows: usize) -> params::Linear {
        let (w_units, w_stride) = self.weight.form.units(4 * k4);
        params::Linear {
            rows: rows as u32,
            k4: k4 as u32,
            n4: n4 as u32,
            w_units: w_units as u32,
            w_stride: w_stride as u32,
            x_stride4: k4 as u32,
            y_stride4: n4 as u32,
            has_bias: u32::from(self.bias.is_some()),
            has_residual: u32::from(self.residual.is_some()),
            scale: self.scale,
            ..params::Linear::default()
        }
    }
}

/// Where a product goes within rows, in vec4s.
#[derive(Clone, Copy)]
struct Part {
    stride4: usize,
    offset4: usize,
    head4: usize,
}

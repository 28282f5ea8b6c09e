//! The launches of a decoder, in the order in which a token passes them. Exchanges are not its business: the
//! runtime calls these between them.

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Recording, Usage};
use crate::model::ModelSpec;
use crate::model::scratch::Scratch;
use crate::weights::{Dense, Experts, LayerWeights, ModelWeights, Norm};
use exflow_shaders::{Kernel, Variant, params};

/// One rank's part of a model, on its device.
pub(crate) struct Decoder {
    pub(crate) gpu: Gpu,
    pub(crate) spec: ModelSpec,
    pub(crate) weights: ModelWeights,
    pub(crate) scratch: Scratch,
    /// Per layer `[slots, 2, heads * D]`.
    pub(crate) cache: Vec<Buffer>,
}

/// Pairs and tiles of one expert launch within the lists on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertBatch {
    pub(crate) first_tile: usize,
    pub(crate) tiles: usize,
    pub(crate) variant: Variant,
}

/// Where the row tile of eight starts to pay: below, most of it would be empty.
const TILE_FROM_ROWS: usize = 4;

/// The variant for `rows` rows of one matrix.
pub(crate) fn tile_for(rows: usize) -> Variant {
    Variant { tile8: rows >= TILE_FROM_ROWS }
}

impl Decoder {
    pub(crate) fn new(
        gpu: Gpu,
        spec: ModelSpec,
        weights: ModelWeights,
        cache_slots: usize,
    ) -> Result<Self, EngineError> {
        let scratch = Scratch::new(&gpu, &spec)?;
        let bytes = (cache_slots * 2 * spec.kv4() * 16) as u64;
        let cache = (0..spec.layers).map(|_| gpu.buffer("KV cache", bytes, Usage::Storage));
        let cache = cache.collect::<Result<_, _>>()?;
        Ok(Self { gpu, spec, weights, scratch, cache })
    }

    /// Makes sure that a step of `rows` rows and `pairs` pairs fits. Call before a step: contents are lost.
    pub(crate) fn reserve(&mut self, rows: usize, pairs: usize) -> Result<(), EngineError> {
        self.scratch.reserve(&self.gpu, &self.spec, rows, pairs).map(|_| ())
    }

    pub(crate) fn record(&self) -> Recording<'_> {
        Recording::new(&self.gpu)
    }

    /// Workgroups along `width4` columns of vec4s.
    fn columns(&self, width4: usize) -> u32 {
        (width4 as u32).div_ceil(self.gpu.workgroup())
    }

    /// `x = wte[token] + wpe[position]`, rows `0..rows`.
    pub(crate) fn embed(&self, r: &mut Recording<'_>, rows: usize) {
        let (s, w) = (&self.scratch, &self.weights);
        let p = params::Embed { rows: rows as u32, width4: self.spec.h4() as u32 };
        let groups = [self.columns(self.spec.h4()), rows as u32, 1];
        let buffers = [&s.tokens, &w.token_embedding, &w.position_embedding, s.x()];
        r.launch(Kernel::Embed, Variant::default(), &p, &buffers, groups);
    }

    /// Keys and values that were made elsewhere and uploaded go into the cache.
    pub(crate) fn append_arrived(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let s = &self.scratch;
        self.append(r, layer, (&s.kv_arrived, 2 * self.spec.kv4(), 0), &s.kv_arrived_slots, rows);
    }

    /// Attention of rows `0..rows` over their contexts, added to the residual stream; then the router's norm
    /// and choice. `blocks` is the length of a row of the block table.
    pub(crate) fn attend_and_route(&self, r: &mut Recording<'_>, layer: usize, rows: usize, blocks: usize) {
        let (s, w, spec) = (&self.scratch, self.layer(layer), &self.spec);
        let kv4 = spec.kv4();
        self.norm(r, &w.norm_1, s.x(), 0, rows);
        self.linear(r, Product::of(&w.qkv), (&s.normed, spec.h4()), (&s.qkv, 3 * kv4), rows);
        self.append(r, layer, (&s.qkv, 3 * kv4, kv4), &s.kv_slots, rows);
        self.attention(r, layer, rows, blocks);
        let product = Product { residual: Some(s.x()), ..Product::of(&w.projection) };
        self.linear(r, product, (&s.attended, kv4), (s.x_next(), spec.h4()), rows);
        s.swap();
        self.norm(r, &w.norm_2, s.x(), 0, rows);
        self.router(r, layer, rows);
    }

    /// Norm of the rows that arrived, `first..first + rows`, as the router's was for those that were here.
    pub(crate) fn norm_arrived(&self, r: &mut Recording<'_>, layer: usize, first: usize, rows: usize) {
        self.norm(r, &self.layer(layer).norm_2, self.scratch.x(), first, rows);
    }

    /// All experts of a layer that is whole on this device, from the router's choice to partials, sized on the
    /// device itself.
    pub(crate) fn all_experts(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        let pairs = rows * spec.top_k;
        let variant = tile_for(pairs / spec.experts);
        let p = params::ExpertPermute {
            pairs: pairs as u32,
            top_k: spec.top_k as u32,
            experts: spec.experts as u32,
            up_groups: self.columns(spec.i4()),
            down_groups: self.columns(spec.h4()),
        };
        let lists = [&s.chosen[layer], &s.weights[layer], &s.pairs_list, &s.tiles, &s.launches];
        r.launch(Kernel::ExpertPermute, variant, &p, &lists, [1, 1, 1]);
        let experts = &self.layer(layer).experts;
        let (up, down) = self.expert_params(0);
        let buffers = up_buffers(s, experts);
        r.launch_indirect(Kernel::ExpertUp, variant, &up, &buffers, (&s.launches, 0));
        let buffers = down_buffers(s, experts);
        r.launch_indirect(Kernel::ExpertDown, variant, &down, &buffers, (&s.launches, 12));
    }

    /// The experts of a batch of uploaded pairs and tiles.
    pub(crate) fn experts(&self, r: &mut Recording<'_>, layer: usize, batch: ExpertBatch) {
        let (s, spec) = (&self.scratch, &self.spec);
        let experts = &self.layer(layer).experts;
        let (up, down) = self.expert_params(batch.first_tile);
        let tiles = batch.tiles as u32;
        let groups = [self.columns(spec.i4()), tiles, 1];
        r.launch(Kernel::ExpertUp, batch.variant, &up, &up_buffers(s, experts), groups);
        let groups = [self.columns(spec.h4()), tiles, 1];
        r.launch(Kernel::ExpertDown, batch.variant, &down, &down_buffers(s, experts), groups);
    }

    /// The residual stream after a layer: each row's residual plus its partials, in router order.
    pub(crate) fn combine(&self, r: &mut Recording<'_>, rows: usize) {
        let s = &self.scratch;
        self.gather(r, &s.source, self.spec.top_k, rows);
        s.swap();
    }

    /// Final norm, head and greedy choice of the `rows` rows that `head_rows` names.
    pub(crate) fn head(&self, r: &mut Recording<'_>, rows: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        self.gather(r, &s.head_rows, 0, rows);
        s.swap();
        self.norm(r, &self.weights.final_norm, s.x(), 0, rows);
        let product = Product { weight: &self.weights.head, bias: None, residual: None };
        self.linear(r, product, (&s.normed, spec.h4()), (&s.logits, spec.v4()), rows);
        let p = params::Argmax { vocab: spec.vocab_size as u32, stride: 4 * spec.v4() as u32 };
        r.launch(Kernel::Argmax, Variant::default(), &p, &[&s.logits, &s.sampled], [rows as u32, 1, 1]);
    }

    fn layer(&self, layer: usize) -> &LayerWeights {
        &self.weights.layers[layer]
    }

    fn append(
        &self,
        r: &mut Recording<'_>,
        layer: usize,
        (source, stride4, offset4): (&Buffer, usize, usize),
        slots: &Buffer,
        rows: usize,
    ) {
        let width4 = 2 * self.spec.kv4();
        let p = params::KvAppend {
            rows: rows as u32,
            width4: width4 as u32,
            stride4: stride4 as u32,
            offset4: offset4 as u32,
        };
        let groups = [self.columns(width4), rows as u32, 1];
        r.launch(Kernel::KvAppend, Variant::default(), &p, &[source, slots, &self.cache[layer]], groups);
    }

    fn norm(&self, r: &mut Recording<'_>, norm: &Norm, x: &Buffer, first: usize, rows: usize) {
        let p = params::LayerNorm {
            rows: rows as u32,
            width: self.spec.hidden as u32,
            width4: self.spec.h4() as u32,
            first_row: first as u32,
            eps: self.spec.norm_eps,
        };
        let buffers = [x, &norm.weight, &norm.bias, &self.scratch.normed];
        r.launch(Kernel::LayerNorm, Variant::default(), &p, &buffers, [rows as u32, 1, 1]);
    }

    fn linear(
        &self,
        r: &mut Recording<'_>,
        product: Product<'_>,
        (x, k4): (&Buffer, usize),
        (y, n4): (&Buffer, usize),
        rows: usize,
    ) {
        let variant = tile_for(rows);
        let p = params::Linear {
            rows: rows as u32,
            k4: k4 as u32,
            n4: n4 as u32,
            has_bias: u32::from(product.bias.is_some()),
            has_residual: u32::from(product.residual.is_some()),
        };
        let absent = &self.weights.final_norm.bias;
        let (bias, residual) = (product.bias.unwrap_or(absent), product.residual.unwrap_or(absent));
        let groups = [self.columns(n4), rows.div_ceil(variant.tile_rows()) as u32, 1];
        r.launch(Kernel::Linear, variant, &p, &[x, product.weight, bias, residual, y], groups);
    }

    fn attention(&self, r: &mut Recording<'_>, layer: usize, rows: usize, blocks: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        let p = params::Attention {
            heads: spec.heads as u32,
            d4: spec.d4() as u32,
            q_stride4: 3 * spec.kv4() as u32,
            table_stride: blocks as u32,
            scale: 1.0 / (spec.head_dim() as f32).sqrt(),
        };
        let buffers = [&s.qkv, &self.cache[layer], &s.queries, &s.block_table, &s.attended];
        let groups = [spec.heads as u32, rows as u32, 1];
        r.launch(Kernel::Attention, Variant::default(), &p, &buffers, groups);
    }

    fn router(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        let (s, spec) = (&self.scratch, &self.spec);
        let p = params::Router {
            rows: rows as u32,
            h4: spec.h4() as u32,
            experts: spec.experts as u32,
            top_k: spec.top_k as u32,
            renormalise: u32::from(spec.renormalise),
        };
        let buffers = [&s.normed, &self.layer(layer).router, &s.chosen[layer], &s.weights[layer]];
        r.launch(Kernel::Router, Variant::default(), &p, &buffers, [rows as u32, 1, 1]);
    }

    fn gather(&self, r: &mut Recording<'_>, source: &Buffer, top_k: usize, rows: usize) {
        let s = &self.scratch;
        let h4 = self.spec.h4();
        let p = params::Combine { rows: rows as u32, h4: h4 as u32, top_k: top_k as u32 };
        let buffers = [s.x(), source, &s.slots, &s.partials, s.x_next()];
        r.launch(Kernel::Combine, Variant::default(), &p, &buffers, [self.columns(h4), rows as u32, 1]);
    }

    fn expert_params(&self, first_tile: usize) -> (params::ExpertUp, params::ExpertDown) {
        let (h4, i4, first_tile) = (self.spec.h4() as u32, self.spec.i4() as u32, first_tile as u32);
        (params::ExpertUp { h4, i4, first_tile }, params::ExpertDown { i4, h4, first_tile })
    }
}

/// A matrix with what is added to its product.
#[derive(Clone, Copy)]
struct Product<'a> {
    weight: &'a Buffer,
    bias: Option<&'a Buffer>,
    residual: Option<&'a Buffer>,
}

impl<'a> Product<'a> {
    fn of(dense: &'a Dense) -> Self {
        Self { weight: &dense.weight, bias: Some(&dense.bias), residual: None }
    }
}

fn up_buffers<'a>(s: &'a Scratch, experts: &'a Experts) -> [&'a Buffer; 6] {
    [&s.pairs_list, &s.tiles, &s.normed, &experts.up.weight, &experts.up.bias, &s.inner]
}

fn down_buffers<'a>(s: &'a Scratch, experts: &'a Experts) -> [&'a Buffer; 6] {
    [&s.pairs_list, &s.tiles, &s.inner, &experts.down.weight, &experts.down.bias, &s.partials]
}

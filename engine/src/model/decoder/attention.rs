//! Attention: from the residual stream to queries, keys and values, over the cache, and back.

use super::{Decoder, Part, Product};
use crate::gpu::{Buffer, Recording};
use crate::model::scratch::Projecting;
use crate::model::{LatentSpec, QkNorm};
use crate::weights::{AttentionWeights, LatentWeights};
use exflow_shaders::{ATTENTION_SPLIT, Cache, Cooperative, KV_BLOCK, Kernel, Values, Variant, params};

/// Sees every position.
const NO_WINDOW: u32 = u32::MAX;

impl Decoder {
    /// Attention of rows `0..rows`, whose norm is there, over their contexts, added to the residual stream. `blocks` is the length of a
    /// row of the block table.
    pub(crate) fn attend(&self, r: &mut Recording<'_>, layer: usize, rows: usize, blocks: usize) {
        let (s, w, spec) = (&self.scratch, self.layer(layer), &self.spec);
        let attention = &spec.attention;
        self.make_keys(r, layer, s.projecting(), rows);
        self.scores(r, layer, rows, blocks);

        let product =
            Product { residual: Some(s.x()), scale: spec.residual_scale, ..Product::of(&w.attention.out) };
        let values = match (&attention.latent, &w.attention.latent, &s.latent) {
            (Some(latent), Some(weights), Some([_, _, values])) => {
                let (v4, latent4, heads) = (latent.value.div_ceil(4), attention.v4(), attention.heads);
                let up = Product { weight: &weights.values, bias: None, residual: None, scale: 1.0 };
                let to = Part { stride4: heads * v4, offset4: 0, head4: v4 };
                let from = (&s.attended, latent4, heads * latent4, latent4);
                self.linear_parts(r, up, from, (values, v4, to), heads, rows);
                (values, heads * v4)
            }
            _ => (&s.attended, attention.heads * attention.v4()),
        };
        self.linear(r, product, values, (s.x_next(), spec.h4()), rows);
        s.swap();
    }

    /// Queries, keys and values of rows whose norm is there, the last two in the cache.
    fn make_keys(&self, r: &mut Recording<'_>, layer: usize, within: Projecting<'_>, rows: usize) {
        let (w, attention) = (self.layer(layer), &self.spec.attention);
        match (&attention.latent, &w.attention.latent, within.latent) {
            (Some(latent), Some(weights), Some(buffers)) => {
                self.project_latent(r, latent, &w.attention, weights, (within, buffers), rows);
            }
            _ if self.keeps(layer) => self.project_kept(r, layer, within, rows),
            _ => self.linear(
                r,
                Product::of(&w.attention.qkv),
                (within.normed, self.spec.h4()),
                (within.qkv, attention.qkv4()),
                rows,
            ),
        }
        if !self.keeps(layer) {
            self.place(r, layer, within, rows);
        }
    }

    /// Keys and values that were made elsewhere and uploaded go into the cache; where they came as their layer's input,
    /// they are made anew, by the launches that made them there.
    pub(crate) fn append_arrived(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        if rows == 0 {
            return;
        }
        let s = &self.scratch;
        match &self.remade {
            Some(remade) => {
                self.norm_arrived(r, layer, remade, rows);
                self.make_keys(r, layer, remade.projecting(&s.kv_arrived_slots), rows);
            }
            None => {
                let came = (&s.kv_arrived, self.spec.attention.cache4(), 0);
                self.append(r, layer, came, &s.kv_arrived_slots, rows);
            }
        }
    }

    /// Whether the product that makes queries, keys and values can put them where they belong: lanes make it for themselves, nothing
    /// stands between but positions, whose pairs are half a head apart, and no columns of several lanes share a scale.
    fn keeps(&self, layer: usize) -> bool {
        let (attention, w) = (&self.spec.attention, &self.layer(layer).attention);
        let plain = attention.latent.is_none() && attention.clip.is_none() && w.qk_norm.is_none();
        let turns = attention.rope.as_ref().is_none_or(|rope| {
            2 * rope.pairs() == attention.head_dim && attention.head_dim.is_multiple_of(8)
        });
        // One text reads the matrix and writes the cache: both are textures, or none is.
        let alike = w.qkv.weight.buffer.is_image() == self.cache[layer].is_image();
        let alone = self.gpu.cut(w.qkv.weight.form).cooperative == Cooperative::No;
        plain && turns && alike && alone && self.cache_form != Cache::Q8
    }

    /// Queries, keys and values in one launch, all where they belong.
    fn project_kept(&self, r: &mut Recording<'_>, layer: usize, within: Projecting<'_>, rows: usize) {
        let (w, attention) = (&self.layer(layer).attention, &self.spec.attention);
        let (product, n4) = (Product::of(&w.qkv), attention.qkv4());
        let turned = attention.rope.as_ref().map_or(0, |_| attention.heads + attention.kv_heads);
        let p = params::Linear {
            kept_from4: attention.q4() as u32,
            turned4: (turned * attention.d4()) as u32,
            half4: attention.rope.as_ref().map_or(0, |rope| rope.pairs() / 4) as u32,
            part4: self.cache_part4() as u32,
            ..product.of_rows(self.spec.h4(), n4, rows)
        };
        let variant =
            Variant { keeps: true, cache: self.cache_form, ..self.gpu.cut(product.weight.form).linear(rows) };
        let bias = product.bias.unwrap_or(self.absent());
        // Where pairs turn, a lane has both halves of them.
        let (variant, across) = match p.half4 {
            0 => self.gpu.along(Kernel::Linear, variant, n4),
            _ => (variant, self.gpu.matrix_groups(Kernel::Linear, variant, n4)),
        };
        let groups = [rows.div_ceil(variant.tile_rows()) as u32, across, 1];
        let from = [within.normed, &product.weight.buffer, bias];
        let to = [within.turns, within.qkv, within.slots, &self.cache[layer]];
        r.launch(Kernel::Linear, variant, &p, &[&from[..], &to].concat(), groups);
    }

    /// Queries against the latent, and the latent with its rotary key.
    fn project_latent(
        &self,
        r: &mut Recording<'_>,
        spec: &LatentSpec,
        w: &AttentionWeights,
        latent: &LatentWeights,
        (within, [low, queries, _]): (Projecting<'_>, &[Buffer; 3]),
        rows: usize,
    ) {
        let (Projecting { normed, qkv, .. }, attention) = (within, &self.spec.attention);
        let (heads, h4, head4, stride4) = (attention.heads, self.spec.h4(), spec.head4(), attention.qkv4());
        let from = match (&latent.q_low, spec.q_rank) {
            (Some((dense, norm)), Some(rank)) => {
                let rank4 = rank.div_ceil(4);
                self.linear(r, Product::of(dense), (normed, h4), (low, rank4), rows);
                self.part_norm(r, (low, rank4, 0), norm, (1, rank4, rank), rows);
                (low, rank4)
            }
            _ => (normed, h4),
        };
        self.linear(r, Product::of(&latent.q), from, (queries, heads * head4), rows);
        let absorb = Product { weight: &latent.absorb, bias: None, residual: None, scale: 1.0 };
        let to = Part { stride4, offset4: 0, head4: attention.d4() };
        self.linear_parts(
            r,
            absorb,
            (queries, head4, heads * head4, head4),
            (qkv, attention.d4(), to),
            heads,
            rows,
        );
        let to = Part { stride4, offset4: attention.q4(), head4: 0 };
        let from = (normed, h4, h4, 0);
        self.linear_parts(r, Product::of(&w.qkv), from, (qkv, attention.cache4(), to), 1, rows);
    }

    /// RMSNorm in place of (parts, vec4s and columns of a part) of rows of (buffer, stride, offset).
    fn part_norm(
        &self,
        r: &mut Recording<'_>,
        (x, stride4, offset4): (&Buffer, usize, usize),
        weight: &Buffer,
        (parts, part4, width): (usize, usize, usize),
        rows: usize,
    ) {
        let eps = self.spec.attention.latent.map_or(self.spec.norm.eps, |latent| latent.eps);
        let p = params::PartNorm {
            stride4: stride4 as u32,
            offset4: offset4 as u32,
            part4: part4 as u32,
            width: width as u32,
            eps,
        };
        r.launch(Kernel::PartNorm, Variant::default(), &p, &[weight, x], [parts as u32, rows as u32, 1]);
    }

    /// Norms, clamps and turns queries and keys, and puts keys and values into the cache.
    fn place(&self, r: &mut Recording<'_>, layer: usize, within: Projecting<'_>, rows: usize) {
        let (w, attention) = (&self.layer(layer).attention, &self.spec.attention);
        let (heads, kv_heads, d4) = (attention.heads, attention.kv_heads, attention.d4());
        let cached = (within.qkv, attention.qkv4(), attention.q4());
        // Weights of queries and of keys, what of a head they norm, and how many heads are normed as one.
        let (weights, normed, spans) = match (&w.latent, attention.latent, &w.qk_norm, attention.qk_norm) {
            (Some(weights), Some(latent), _, _) => ((None, Some(&weights.norm)), latent.kv_rank, (1, 1)),
            (_, _, Some((queries, keys)), kind) => {
                let whole = kind == Some(QkNorm::Projection);
                let spans = if whole { (heads, kv_heads) } else { (1, 1) };
                ((Some(queries), Some(keys)), attention.head_dim, spans)
            }
            _ => ((None, None), 0, (1, 1)),
        };
        if normed == 0 && attention.rope.is_none() && attention.clip.is_none() {
            return self.append(r, layer, cached, within.slots, rows);
        }
        // Columns that share a scale lie within a part, or are written by themselves.
        let appends = self.cache_form != Cache::Q8 || (spans.1 * d4).is_multiple_of(8);
        let p = params::Place {
            stride4: attention.qkv4() as u32,
            offset4: 0,
            d4: d4 as u32,
            q_heads: heads as u32,
            k_heads: kv_heads as u32,
            q_span: spans.0 as u32,
            k_span: spans.1 as u32,
            cache4: attention.cache4() as u32,
            appends: u32::from(appends),
            normed4: normed.div_ceil(4) as u32,
            normed: normed as u32,
            norms_queries: u32::from(weights.0.is_some()),
            clips: u32::from(attention.clip.is_some()),
            limit: attention.clip.unwrap_or(0.0),
            first: attention.latent.map_or(0, |latent| latent.kv_rank.next_multiple_of(4)) as u32,
            half: attention.rope.as_ref().map_or(0, |rope| rope.pairs()) as u32,
            part4: self.cache_part4() as u32,
            eps: attention.latent.map_or(self.spec.norm.eps, |latent| latent.eps),
        };
        let kinds = if attention.latent.is_some() { 1 } else { 2 };
        let parts = heads / spans.0 + kinds * (kv_heads / spans.1);
        let absent = self.absent();
        let (q_weight, k_weight) = (weights.0.unwrap_or(absent), weights.1.unwrap_or(absent));
        let buffers = [q_weight, k_weight, within.turns, within.slots, within.qkv, &self.cache[layer]];
        r.launch(Kernel::Place, self.cache_lanes(), &p, &buffers, [parts as u32, rows as u32, 1]);
        if !appends {
            self.append(r, layer, cached, within.slots, rows);
        }
    }

    /// Keys and values at (buffer, stride, offset) into the cache as they are.
    fn append(
        &self,
        r: &mut Recording<'_>,
        layer: usize,
        (source, stride4, offset4): (&Buffer, usize, usize),
        slots: &Buffer,
        rows: usize,
    ) {
        let width4 = self.spec.attention.cache4() as u32;
        let p = params::Place {
            stride4: stride4 as u32,
            offset4: offset4 as u32,
            d4: width4,
            q_span: 1,
            k_span: 1,
            cache4: width4,
            appends: 1,
            part4: self.cache_part4() as u32,
            ..params::Place::default()
        };
        let absent = self.absent();
        let buffers = [absent, absent, absent, slots, source, &self.cache[layer]];
        r.launch(Kernel::Place, self.cache_lanes(), &p, &buffers, [1, rows as u32, 1]);
    }

    /// The variant of kernels that have a workgroup for each row and touch the cache.
    fn cache_lanes(&self) -> Variant {
        Variant { cache: self.cache_form, ..self.lanes() }
    }

    /// Attention over contexts of up to `blocks` blocks; where rows and heads alone leave much of the device idle, each split
    /// of a context has workgroups of its own.
    pub(super) fn scores(&self, r: &mut Recording<'_>, layer: usize, rows: usize, blocks: usize) {
        let (s, attention) = (&self.scratch, &self.spec.attention);
        let latent = attention.latent.is_some();
        let window = attention.windows[layer].and_then(|w| u32::try_from(w).ok()).unwrap_or(NO_WINDOW);
        let sinks = &self.layer(layer).attention.sinks;
        let p = params::Attention {
            group: (attention.heads / attention.kv_heads) as u32,
            d4: attention.d4() as u32,
            v4: attention.v4() as u32,
            q_stride4: attention.qkv4() as u32,
            cache_stride4: attention.cache4() as u32,
            v_offset4: if latent { 0 } else { (attention.kv_heads * attention.d4()) as u32 },
            v_head4: attention.v4() as u32,
            table_stride: blocks as u32,
            window,
            has_sinks: u32::from(sinks.is_some()),
            part4: self.cache_part4() as u32,
            scale: attention.scale,
        };
        let variant = Variant { values: Values::of(attention.value_dim), ..self.cache_lanes() };
        let sinks = sinks.as_ref().unwrap_or(self.absent());
        let splits = (blocks * KV_BLOCK).div_ceil(ATTENTION_SPLIT);
        let (heads, rows) = (attention.heads, rows as u32);
        let from = [&s.qkv, &self.cache[layer], &s.queries, &s.block_table, sinks];
        let in_splits = splits > 1
            && heads * (rows as usize) < self.gpu.width()
            && heads * rows as usize * splits <= s.splits;
        if !in_splits {
            let buffers = [&from[..], &[&s.attended]].concat();
            return r.launch(Kernel::Attention, variant, &p, &buffers, [heads as u32, rows, 1]);
        }
        let (variant, buffers) =
            (Variant { split: true, ..variant }, [&from[..], &[&s.split_attention]].concat());
        r.launch(Kernel::Attention, variant, &p, &buffers, [heads as u32, rows, splits as u32]);
        let p = params::AttentionMerge { v4: p.v4, splits: splits as u32, window, has_sinks: p.has_sinks };
        let buffers = [&s.split_attention, &s.queries, sinks, &s.attended];
        r.launch(Kernel::AttentionMerge, Variant::default(), &p, &buffers, [heads as u32, rows, 1]);
    }
}

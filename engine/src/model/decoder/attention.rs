//! Attention: from the residual stream to queries, keys and values, over the cache, and back.

use super::{Decoder, Part, Product};
use crate::gpu::{Buffer, Recording};
use crate::model::{LatentSpec, QkNorm};
use crate::weights::{AttentionWeights, LatentWeights};
use exflow_shaders::{Kernel, Values, Variant, params};

/// Sees every position.
const NO_WINDOW: u32 = u32::MAX;

impl Decoder {
    /// Attention of rows `0..rows`, whose norm is there, over their contexts, added to the residual stream. `blocks` is the length of a
    /// row of the block table.
    pub(crate) fn attend(&self, r: &mut Recording<'_>, layer: usize, rows: usize, blocks: usize) {
        let (s, w, spec) = (&self.scratch, self.layer(layer), &self.spec);
        let attention = &spec.attention;
        match (&attention.latent, &w.attention.latent, &s.latent) {
            (Some(latent), Some(weights), Some(buffers)) => {
                self.project_latent(r, latent, &w.attention, weights, buffers, rows);
            }
            _ => self.project(r, &w.attention, rows),
        }
        if let Some(limit) = attention.clip {
            let p = params::Clip { width4: attention.qkv4() as u32, limit };
            let groups = [self.columns(attention.qkv4()), rows as u32, 1];
            r.launch(Kernel::Clip, Variant::default(), &p, &[&s.qkv], groups);
        }
        self.turn(r, rows);
        let cached = (&s.qkv, attention.qkv4(), attention.q4());
        self.append(r, layer, cached, &s.kv_slots, rows);
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

    /// Keys and values that were made elsewhere and uploaded go into the cache.
    pub(crate) fn append_arrived(&self, r: &mut Recording<'_>, layer: usize, rows: usize) {
        if rows == 0 {
            return;
        }
        let s = &self.scratch;
        self.append(r, layer, (&s.kv_arrived, self.spec.attention.cache4(), 0), &s.kv_arrived_slots, rows);
    }

    fn project(&self, r: &mut Recording<'_>, w: &AttentionWeights, rows: usize) {
        let (s, attention) = (&self.scratch, &self.spec.attention);
        self.linear(r, Product::of(&w.qkv), (&s.normed, self.spec.h4()), (&s.qkv, attention.qkv4()), rows);
        let (Some((queries, keys)), Some(kind)) = (&w.qk_norm, attention.qk_norm) else { return };
        let (d, d4) = (attention.head_dim, attention.d4());
        for (weight, heads, offset4) in
            [(queries, attention.heads, 0), (keys, attention.kv_heads, attention.q4())]
        {
            let (parts, part4, width) = match kind {
                QkNorm::Head => (heads, d4, d),
                QkNorm::Projection => (1, heads * d4, heads * d),
            };
            self.part_norm(r, (&s.qkv, attention.qkv4(), offset4), weight, (parts, part4, width), rows);
        }
    }

    /// Queries against the latent, and the latent with its rotary key.
    fn project_latent(
        &self,
        r: &mut Recording<'_>,
        spec: &LatentSpec,
        w: &AttentionWeights,
        latent: &LatentWeights,
        [low, queries, _]: &[Buffer; 3],
        rows: usize,
    ) {
        let (s, attention) = (&self.scratch, &self.spec.attention);
        let (heads, h4, head4, stride4) = (attention.heads, self.spec.h4(), spec.head4(), attention.qkv4());
        let from = match (&latent.q_low, spec.q_rank) {
            (Some((dense, norm)), Some(rank)) => {
                let rank4 = rank.div_ceil(4);
                self.linear(r, Product::of(dense), (&s.normed, h4), (low, rank4), rows);
                self.part_norm(r, (low, rank4, 0), norm, (1, rank4, rank), rows);
                (low, rank4)
            }
            _ => (&s.normed, h4),
        };
        self.linear(r, Product::of(&latent.q), from, (queries, heads * head4), rows);
        let absorb = Product { weight: &latent.absorb, bias: None, residual: None, scale: 1.0 };
        let to = Part { stride4, offset4: 0, head4: attention.d4() };
        self.linear_parts(
            r,
            absorb,
            (queries, head4, heads * head4, head4),
            (&s.qkv, attention.d4(), to),
            heads,
            rows,
        );
        let to = Part { stride4, offset4: attention.q4(), head4: 0 };
        let from = (&s.normed, h4, h4, 0);
        self.linear_parts(r, Product::of(&w.qkv), from, (&s.qkv, attention.cache4(), to), 1, rows);
        let width = (1, spec.kv_rank.div_ceil(4), spec.kv_rank);
        self.part_norm(r, (&s.qkv, stride4, attention.q4()), &latent.norm, width, rows);
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

    /// Rotary positions of queries and keys, which stand side by side.
    fn turn(&self, r: &mut Recording<'_>, rows: usize) {
        let (s, attention) = (&self.scratch, &self.spec.attention);
        let Some(rope) = &attention.rope else { return };
        let heads = attention.heads + attention.kv_heads;
        let first = attention.latent.map_or(0, |latent| latent.kv_rank.next_multiple_of(4));
        let p = params::Rope {
            rows: rows as u32,
            heads: heads as u32,
            stride: 4 * attention.qkv4() as u32,
            offset: 0,
            head: 4 * attention.d4() as u32,
            first: first as u32,
            half: rope.pairs() as u32,
        };
        let groups = [self.columns(heads * rope.pairs()), rows as u32, 1];
        r.launch(Kernel::Rope, Variant::default(), &p, &[&s.turns, &s.qkv], groups);
    }

    fn append(
        &self,
        r: &mut Recording<'_>,
        layer: usize,
        (source, stride4, offset4): (&Buffer, usize, usize),
        slots: &Buffer,
        rows: usize,
    ) {
        let width4 = self.spec.attention.cache4();
        let p = params::KvAppend {
            rows: rows as u32,
            width4: width4 as u32,
            stride4: stride4 as u32,
            offset4: offset4 as u32,
        };
        let groups = [self.columns(width4), rows as u32, 1];
        let variant = Variant { cache: self.cache_form, ..Variant::default() };
        r.launch(Kernel::KvAppend, variant, &p, &[source, slots, &self.cache[layer]], groups);
    }

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
            scale: attention.scale,
        };
        let variant =
            Variant { values: Values::of(attention.value_dim), cache: self.cache_form, ..self.lanes() };
        let sinks = sinks.as_ref().unwrap_or(self.absent());
        let buffers = [&s.qkv, &self.cache[layer], &s.queries, &s.block_table, sinks, &s.attended];
        r.launch(Kernel::Attention, variant, &p, &buffers, [attention.heads as u32, rows as u32, 1]);
    }
}

//! The heaviest launches of a layer one by one, for measurements.

use super::{Decoder, Product};
use crate::gpu::Recording;
use crate::weights::{Ffn, LayerFfn, Matrix};
use exflow_shaders::params::Query;
use exflow_shaders::{Cooperative, KV_BLOCK, Weights};

/// A launch, or a few that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    Norm,
    Projection,
    Attention,
    Output,
    Router,
    Experts,
    Head,
}

impl Piece {
    pub(crate) const ALL: [Self; 7] = [
        Self::Norm,
        Self::Projection,
        Self::Attention,
        Self::Output,
        Self::Router,
        Self::Experts,
        Self::Head,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Projection => "projection from the hidden state",
            Self::Attention => "attention",
            Self::Output => "output projection",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::Head => "head",
        }
    }
}

impl Decoder {
    /// The layer whose pieces are measured: the first with experts.
    fn bench_layer(&self) -> usize {
        self.spec.moe_layers.first().copied().unwrap_or(0)
    }

    /// Writes what the pieces read: rows that differ, behind a context of `context` positions (or, where there are
    /// several, one prompt). Returns the length of a row of the block table.
    pub(crate) fn prepare_bench(&self, rows: usize, context: usize) -> usize {
        let s = &self.scratch;
        let width = 4 * self.spec.h4();
        let value = |i: usize| (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
        let x: Vec<f32> = (0..rows * width).map(value).collect();
        let last = |row: usize| if rows == 1 { context - 1 } else { row };
        let queries: Vec<Query> =
            (0..rows).map(|row| Query { position: last(row) as u32, table_row: 0 }).collect();
        let blocks = (last(rows - 1) + 1).div_ceil(KV_BLOCK);
        let table: Vec<u32> = (0..blocks as u32).collect();
        self.gpu.write(s.x(), 0, &x);
        self.gpu.write(&s.queries, 0, &queries);
        self.gpu.hold(&s.block_table, &table);
        self.gpu.hold(&s.head_rows, &(0..rows as u32).collect::<Vec<_>>());
        let mut r = self.record();
        self.route(&mut r, self.bench_layer(), rows);
        // Nobody waits: what is measured next is submitted behind it.
        let _ = r.submit();
        blocks
    }

    /// Records a piece.
    pub(crate) fn piece(&self, r: &mut Recording<'_>, piece: Piece, rows: usize, blocks: usize) {
        let (s, spec, layer) = (&self.scratch, &self.spec, self.bench_layer());
        let attention = &self.layer(layer).attention;
        match piece {
            Piece::Norm => self.norm_ffn(r, layer, 0, rows),
            Piece::Projection => {
                let (n4, stride4) = (attention.qkv.weight.height4, spec.attention.qkv4());
                let part = super::Part { stride4, offset4: 0, head4: 0 };
                let from = (&s.normed, spec.h4(), spec.h4(), 0);
                self.linear_parts(r, Product::of(&attention.qkv), from, (&s.qkv, n4, part), 1, rows);
            }
            Piece::Attention => self.scores(r, layer, rows, blocks),
            Piece::Output => {
                let (from, k4) = match &s.latent {
                    Some([_, _, values]) => (values, attention.out.weight.width4),
                    None => (&s.attended, attention.out.weight.width4),
                };
                self.linear(r, Product::of(&attention.out), (from, k4), (s.x_next(), spec.h4()), rows);
            }
            Piece::Router => self.route(r, layer, rows),
            Piece::Experts => self.all_experts(r, layer, rows),
            Piece::Head => self.logits(r, rows),
        }
    }

    /// How the weights of a piece lie; the cache and the router's matrix are read as f32 is.
    pub(crate) fn piece_form(&self, piece: Piece) -> Weights {
        let attention = &self.layer(self.bench_layer()).attention;
        match piece {
            Piece::Projection => attention.qkv.weight.form,
            Piece::Output => attention.out.weight.form,
            Piece::Head => self.weights.head.first().map_or(Weights::F32, |chunk| chunk.rows.weight.form),
            Piece::Experts => self.weights.expert_form(),
            Piece::Norm | Piece::Attention | Piece::Router => Weights::F32,
        }
    }

    /// Whether a piece is a product that matrix units make.
    pub(crate) fn piece_cooperates(&self, piece: Piece) -> bool {
        let is_product = matches!(piece, Piece::Projection | Piece::Output | Piece::Experts | Piece::Head);
        is_product && self.gpu.cut(self.piece_form(piece)).cooperative != Cooperative::No
    }

    /// Operations of a piece, and the bytes of weights and cache that it cannot but read.
    pub(crate) fn piece_work(&self, piece: Piece, rows: usize, context: usize) -> (f64, f64) {
        let (spec, layer) = (&self.spec, self.layer(self.bench_layer()));
        let product = |matrix: &Matrix| {
            let flops = 2.0 * (rows * matrix.height4 * 4) as f64 * (matrix.width4 * 4) as f64;
            (flops, matrix.bytes() as f64)
        };
        let hidden_bytes = (rows * spec.h4() * 16) as f64;
        match piece {
            Piece::Norm => (hidden_bytes, 2.0 * hidden_bytes),
            Piece::Projection => product(&layer.attention.qkv.weight),
            Piece::Output => product(&layer.attention.out.weight),
            Piece::Head => {
                let chunks = self.weights.head.iter().map(|chunk| product(&chunk.rows.weight));
                chunks.fold((0.0, 0.0), |all, of| (all.0 + of.0, all.1 + of.1))
            }
            Piece::Attention => {
                let of = &spec.attention;
                let seen = if rows == 1 { context } else { rows * (rows + 1) / 2 };
                let values = (seen * of.heads * (of.d4() + of.v4()) * 4) as f64;
                (2.0 * values, (4 * context.max(rows) * self.cache_form.words(4 * of.cache4())) as f64)
            }
            Piece::Router => {
                let weights = (spec.experts * spec.h4() * 4) as f64;
                (2.0 * rows as f64 * weights, 4.0 * weights)
            }
            Piece::Experts => {
                let LayerFfn::Moe { experts, .. } = &layer.ffn else { return (0.0, 0.0) };
                let pairs = rows * spec.top_k;
                let matrices = spec.expert.activation.matrices() + 1;
                let one = (matrices * spec.h4() * spec.expert.i4() * 16) as f64;
                let of = |ffn: &Ffn| ffn.up.weight.bytes() + ffn.down.weight.bytes();
                let bytes: usize = experts.chunks.iter().map(|chunk| of(&chunk.ffn)).sum();
                let share = pairs.min(spec.experts) as f64 / spec.experts as f64;
                (2.0 * pairs as f64 * one, bytes as f64 * share)
            }
        }
    }
}

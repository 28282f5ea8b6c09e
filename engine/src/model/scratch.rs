//! The buffers that a step works in, grown when a batch is larger than any before.

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Usage};
use crate::model::ModelSpec;
use exflow_shaders::ATTENTION_SPLIT;
use exflow_shaders::params::Draw;
use std::cell::Cell;

/// Keys and values from elsewhere are written into the cache in launches of at most so many rows.
pub(crate) const KV_CHUNK: usize = 256;

/// Attention in splits takes no more; where it would, contexts are attended to in one go.
const SPLIT_BYTES: usize = 64 << 20;

/// Splits that attention may make at once: of a few rows with the longest context.
pub(crate) fn attention_splits(spec: &ModelSpec) -> usize {
    let attention = &spec.attention;
    match spec.max_positions.div_ceil(ATTENTION_SPLIT) {
        0 | 1 => 0,
        of_context => (4 * attention.heads * of_context).min(SPLIT_BYTES / (16 * (1 + attention.v4()))),
    }
}

/// Working buffers of one rank. Rows are padded to whole vec4s.
pub(crate) struct Scratch {
    rows: usize,
    heads: usize,
    /// `[T]` (token id, position).
    pub(crate) tokens: Buffer,
    /// Two buffers `[rows, H]` of the residual stream, read and written in turn.
    residual: [Buffer; 2],
    current: Cell<usize>,
    /// `[rows, H]` normed rows.
    pub(crate) normed: Buffer,
    /// `[T]` of queries, then what the cache holds of the token.
    pub(crate) qkv: Buffer,
    /// `[T, heads * value]`.
    pub(crate) attended: Buffer,
    /// `[splits, 1 + value]` what stands between the two launches of attention in splits.
    pub(crate) split_attention: Buffer,
    /// How many splits of how many rows and heads that holds: a few rows with the longest context.
    pub(crate) splits: usize,
    /// `[T, pairs]` cosines and sines.
    pub(crate) turns: Buffer,
    /// Latent attention: `[T, q_rank]`, `[T, heads * (nope + rope)]` and `[T, heads * value]`.
    pub(crate) latent: Option<[Buffer; 3]>,
    /// Per MoE layer `[T, K]`: chosen experts.
    pub(crate) chosen: Vec<Buffer>,
    /// Per MoE layer `[T, K]`: router weights.
    pub(crate) weights: Vec<Buffer>,
    /// `[pairs + 2T]` sorted (token, expert) pairs; behind those of experts the rows of shared and dense FFNs.
    pub(crate) pairs_list: Buffer,
    /// `[pairs + 2T]` tiles at most.
    pub(crate) tiles: Buffer,
    /// `[2, 3]` sizes of the expert launches.
    pub(crate) launches: Buffer,
    /// `[pairs + 2T, I]`.
    pub(crate) inner: Buffer,
    /// `[pairs + received + T, H]` weighted outputs of experts, made here or received, and of a shared or dense FFN.
    pub(crate) partials: Buffer,
    /// `[T]` rows that residuals come from.
    pub(crate) source: Buffer,
    /// `[T, K + 1]` rows of `partials` to add at a MoE layer.
    pub(crate) slots: Buffer,
    /// `[T]` rows of `partials` to add at a dense layer.
    pub(crate) dense_slots: Buffer,
    /// `[T]` where keys and values go.
    pub(crate) kv_slots: Buffer,
    /// `[T]` what attention needs to know of each token.
    pub(crate) queries: Buffer,
    /// `[sequences, blocks]`.
    pub(crate) block_table: Buffer,
    /// `[heads]` rows that the head is asked for.
    pub(crate) head_rows: Buffer,
    /// `[KV_CHUNK]` of what the cache holds of a token: keys and values made elsewhere.
    pub(crate) kv_arrived: Buffer,
    /// `[KV_CHUNK]` where they go.
    pub(crate) kv_arrived_slots: Buffer,
    /// What the head makes, of as many rows each as one binding takes the logits of; the last one has fewer.
    head_parts: Vec<HeadPart>,
    /// `[heads]`.
    pub(crate) sampled: Buffer,
    /// `[heads]` how each of them is drawn.
    pub(crate) draws: Buffer,
    /// Whether any is.
    pub(crate) has_draws: Cell<bool>,
}

/// Consecutive rows that the head is asked for.
pub(crate) struct HeadPart {
    /// The logits `[rows, V]` of so many.
    rows: usize,
    pub(crate) logits: Buffer,
    /// Their stretches of [`Scratch::normed`], [`Scratch::sampled`] and [`Scratch::draws`].
    pub(crate) normed: Buffer,
    pub(crate) sampled: Buffer,
    pub(crate) draws: Buffer,
}

/// Parts begin at multiples of so many rows: their stretches of buffers with a word or more for each then begin where they
/// may be bound.
const HEAD_ROWS: usize = 64;

/// The buffers between a layer's normed input and what the cache holds of a token: those of a step's rows, or of rows
/// that came from elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Projecting<'a> {
    pub(crate) normed: &'a Buffer,
    pub(crate) qkv: &'a Buffer,
    pub(crate) turns: &'a Buffer,
    /// `[T]` where in the cache they go.
    pub(crate) slots: &'a Buffer,
    pub(crate) latent: Option<&'a [Buffer; 3]>,
}

/// What keys and values are made anew from and in, for up to [`KV_CHUNK`] rows that came as their layer's input.
pub(crate) struct Remade {
    /// `[KV_CHUNK, H]` residual streams as they entered the layer.
    pub(crate) x: Buffer,
    pub(crate) normed: Buffer,
    qkv: Buffer,
    /// `[KV_CHUNK, pairs]` cosines and sines.
    pub(crate) turns: Buffer,
    latent: Option<[Buffer; 3]>,
}

impl Remade {
    pub(crate) fn new(gpu: &Gpu, spec: &ModelSpec) -> Result<Self, EngineError> {
        let storage = |label: &str, words: usize| gpu.buffer(label, 4 * words as u64, Usage::Storage);
        let (rows, h) = (KV_CHUNK, 4 * spec.h4());
        Ok(Self {
            x: storage("arrived layer inputs", rows * h)?,
            normed: storage("arrived normed rows", rows * h)?,
            qkv: storage("arrived queries, keys, values", rows * 4 * spec.attention.qkv4())?,
            turns: storage("arrived turns", rows * turn_words(spec))?,
            latent: latents(gpu, spec, rows)?,
        })
    }

    /// With the cache's slots of the rows.
    pub(crate) fn projecting<'a>(&'a self, slots: &'a Buffer) -> Projecting<'a> {
        let Self { normed, qkv, turns, latent, .. } = self;
        Projecting { normed, qkv, turns, slots, latent: latent.as_ref() }
    }
}

/// Cosines and sines of a row.
fn turn_words(spec: &ModelSpec) -> usize {
    spec.attention.rope.as_ref().map_or(1, |r| 2 * r.pairs().max(1))
}

fn latents(gpu: &Gpu, spec: &ModelSpec, rows: usize) -> Result<Option<[Buffer; 3]>, EngineError> {
    let storage = |label: &str, words: usize| gpu.buffer(label, 4 * words as u64, Usage::Storage);
    let attention = &spec.attention;
    let Some(latent) = attention.latent else { return Ok(None) };
    Ok(Some([
        storage("query latents", rows * latent.q_rank.unwrap_or(1).next_multiple_of(4))?,
        storage("queries before absorption", rows * 4 * attention.heads * latent.head4())?,
        storage("values", rows * attention.heads * latent.value.next_multiple_of(4))?,
    ]))
}

fn head_parts(
    gpu: &Gpu,
    spec: &ModelSpec,
    heads: usize,
    [normed, sampled, draws]: [&Buffer; 3],
) -> Result<Vec<HeadPart>, EngineError> {
    let row = 16 * spec.v4() as u64;
    let together = HEAD_ROWS * (gpu.max_part_bytes() / (HEAD_ROWS as u64 * row)).max(1) as usize;
    let part = |first: usize| {
        let rows = together.min(heads - first);
        let of = |whole: &Buffer, bytes: usize| match rows == heads {
            true => whole.clone(),
            false => gpu.part(whole, (bytes * first) as u64, (bytes * rows) as u64),
        };
        Ok(HeadPart {
            rows,
            logits: gpu.buffer("logits", rows as u64 * row, Usage::Storage)?,
            normed: of(normed, 16 * spec.h4()),
            sampled: of(sampled, 4),
            draws: of(draws, size_of::<Draw>()),
        })
    };
    (0..heads).step_by(together).map(part).collect()
}

impl Scratch {
    /// Buffers for a few rows.
    pub(crate) fn new(gpu: &Gpu, spec: &ModelSpec) -> Result<Self, EngineError> {
        Self::sized(gpu, spec, 16, 16)
    }

    /// Makes sure that `rows` rows fit, and the head's logits for `heads` of them. What the buffers held is lost
    /// where they have to grow.
    pub(crate) fn reserve(
        &mut self,
        gpu: &Gpu,
        spec: &ModelSpec,
        rows: usize,
        heads: usize,
    ) -> Result<bool, EngineError> {
        if rows <= self.rows && heads <= self.heads {
            return Ok(false);
        }
        let rows = rows.max(heads);
        let grown = |have: usize, need: usize| if need <= have { have } else { need.next_power_of_two() };
        *self = Self::sized(gpu, spec, grown(self.rows, rows), grown(self.heads, heads))?;
        Ok(true)
    }

    /// The parts that the first `heads` rows of the head lie in, each with how many of them.
    pub(crate) fn head_parts(&self, heads: usize) -> impl Iterator<Item = (&HeadPart, usize)> {
        let mut left = heads;
        let parts = self.head_parts.iter().map(move |part| {
            let rows = part.rows.min(left);
            left -= rows;
            (part, rows)
        });
        parts.take_while(|(_, rows)| *rows > 0)
    }

    pub(crate) fn projecting(&self) -> Projecting<'_> {
        let Self { normed, qkv, turns, kv_slots, latent, .. } = self;
        Projecting { normed, qkv, turns, slots: kv_slots, latent: latent.as_ref() }
    }

    /// `[rows, H]` the residual stream: own rows first, arrived rows behind them.
    pub(crate) fn x(&self) -> &Buffer {
        &self.residual[self.current.get()]
    }

    /// `[rows, H]` the residual stream to be.
    pub(crate) fn x_next(&self) -> &Buffer {
        &self.residual[1 - self.current.get()]
    }

    /// What was being written becomes what is read.
    pub(crate) fn swap(&self) {
        self.current.set(1 - self.current.get());
    }

    fn sized(gpu: &Gpu, spec: &ModelSpec, rows: usize, heads: usize) -> Result<Self, EngineError> {
        let pairs = rows * spec.top_k;
        let storage = |label: &str, words: usize| gpu.buffer(label, 4 * words as u64, Usage::Storage);
        let (h, attention) = (4 * spec.h4(), &spec.attention);
        let per_layer = |label: &str| {
            (0..spec.moe_layers()).map(|_| storage(label, rows * spec.top_k)).collect::<Result<Vec<_>, _>>()
        };
        let splits = attention_splits(spec);
        let normed = storage("normed rows", rows * h)?;
        let sampled = storage("sampled tokens", heads)?;
        let draws = storage("draws", heads * size_of::<Draw>() / 4)?;
        let head_parts = head_parts(gpu, spec, heads, [&normed, &sampled, &draws])?;
        Ok(Self {
            rows,
            heads,
            tokens: storage("tokens", 2 * rows)?,
            residual: [storage("residual", rows * h)?, storage("next residual", rows * h)?],
            current: Cell::new(0),
            normed,
            qkv: storage("queries, keys, values", rows * 4 * attention.qkv4())?,
            attended: storage("attention output", rows * 4 * attention.heads * attention.v4())?,
            split_attention: storage("splits of attention", splits * 4 * (1 + attention.v4()))?,
            splits,
            turns: storage("turns", rows * turn_words(spec))?,
            latent: latents(gpu, spec, rows)?,
            chosen: per_layer("chosen experts")?,
            weights: per_layer("router weights")?,
            pairs_list: storage("pairs", 4 * (pairs + 2 * rows))?,
            tiles: storage("tiles", 4 * (pairs + 2 * rows))?,
            launches: gpu.buffer("expert launches", 24, Usage::Indirect)?,
            inner: storage("expert inner rows", (pairs + 2 * rows) * 4 * spec.largest_i4())?,
            partials: storage("partials", (pairs + rows * (spec.top_k + 1)) * h)?,
            source: storage("residual rows", rows)?,
            slots: storage("partial rows", rows * spec.partials())?,
            dense_slots: storage("dense partial rows", rows)?,
            kv_slots: storage("cache slots", rows)?,
            queries: storage("queries", 2 * rows)?,
            block_table: storage(
                "block table",
                rows * spec.max_positions.div_ceil(exflow_shaders::KV_BLOCK),
            )?,
            head_rows: storage("rows for the head", heads)?,
            kv_arrived: storage("arrived keys and values", KV_CHUNK * 4 * attention.cache4())?,
            kv_arrived_slots: storage("arrived cache slots", KV_CHUNK)?,
            head_parts,
            sampled,
            draws,
            has_draws: Cell::new(false),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn logits_lie_in_as_few_buffers_as_can_be_bound() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/gpt-moe-16e");
        let spec = ModelSpec::read(&model).expect("a model");
        let mut gpu = Gpu::open(None, 0).expect("an adapter");
        let rows_of = |gpu: &Gpu, heads: usize| -> Vec<(usize, u64)> {
            let scratch = Scratch::sized(gpu, &spec, 512, 512).expect("buffers");
            scratch.head_parts(heads).map(|(part, rows)| (rows, part.logits.bytes())).collect()
        };
        let row = 16 * spec.v4() as u64;
        assert_eq!(rows_of(&gpu, 300), [(300, 512 * row)]);
        for (limit, together) in [(1, 64), (64 * row, 64), (200 * row, 192), (511 * row, 448)] {
            gpu.limit_chunks(Some(limit));
            let parts = rows_of(&gpu, 512);
            assert_eq!(parts.iter().map(|(rows, _)| rows).sum::<usize>(), 512);
            let full = parts.iter().rev().skip(1).all(|part| *part == (together, together as u64 * row));
            assert!(full && parts.len() == 512_usize.div_ceil(together), "{limit}: {parts:?}");
            assert_eq!(rows_of(&gpu, 1), [(1, together as u64 * row)]);
            assert!(rows_of(&gpu, 0).is_empty());
        }
    }
}

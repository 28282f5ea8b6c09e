//! Kernels that every row passes: embedding, norms, products, attention, head.

use super::{Bench, D4, H, H4, KV, N, N4, Values, WIDTH, error};
use crate::EngineError;
use exflow_shaders::params::{self, Query};
use exflow_shaders::{KV_BLOCK, Kernel, NO_SLOT, Variant, reference};

impl Bench {
    pub(super) fn embed(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (wte, wpe) = (v.floats(44 * H), v.floats(70 * H));
        let (packed, _) = self.matrix(variant, &wte, (44, H))?;
        let tokens: Vec<[u32; 2]> =
            v.below(42, rows).into_iter().enumerate().map(|(i, id)| [id, i as u32]).collect();
        let mut worst = 0f64;
        for (has_positions, scale) in [(1, 1.0), (0, 12.0)] {
            let p = params::Embed { rows: rows as u32, width4: H4 as u32, vocab4: 11, has_positions, scale };
            let mut expected = vec![0.0; rows * H];
            reference::embed(&p, &tokens, &wte, &wpe, &mut expected);
            let out = self.up(&vec![0f32; rows * H])?;
            let buffers = [&self.up(&tokens)?, &packed, &self.up(&wpe)?, &out];
            let groups = [self.columns(H4), rows as u32, 1];
            let got = self.run(Kernel::Embed, variant, &p, &buffers, groups, rows * H)?;
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn norm(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (first, top_k) = (2, 2);
        let (source, mut slots) =
            (v.below(rows + first, rows + first), v.below(2 * rows, top_k * (rows + first)));
        slots[first * top_k] = NO_SLOT;
        let mut partials = v.floats(2 * rows * H);
        let (mut weight, mut bias) = (v.floats(H), v.floats(H));
        let (mut before, mut x) = (v.floats((rows + first) * H), v.floats((rows + first) * H));
        for column in WIDTH..H {
            (weight[column], bias[column]) = (0.0, 0.0);
            for values in [&mut x, &mut before, &mut partials] {
                values.iter_mut().skip(column).step_by(H).for_each(|value| *value = 0.0);
            }
        }
        let mut worst = 0f64;
        // Rows that are there; rows that are gathered; rows that are made of a residual and partials.
        for (centred, combines, top_k) in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, top_k), (1, 1, top_k)] {
            let p = params::Norm {
                width: WIDTH as u32,
                width4: H4 as u32,
                first_row: first as u32,
                combines,
                top_k: top_k as u32,
                centred,
                eps: 1e-5,
            };
            let (mut made, mut expected) = (x.clone(), vec![0.0; x.len()]);
            reference::norm(
                &p,
                rows,
                &before,
                &source,
                &slots,
                &partials,
                &weight,
                &bias,
                &mut made,
                &mut expected,
            );
            let (residual, out) = (self.up(&x)?, self.up(&vec![0f32; x.len()])?);
            let lists = [&self.up(&before)?, &self.up(&source)?, &self.up(&slots)?, &self.up(&partials)?];
            let norm = [&self.up(&weight)?, &self.up(&bias)?, &residual, &out];
            let buffers = [&lists[..], &norm].concat();
            let got = self.run(Kernel::Norm, variant, &p, &buffers, [rows as u32, 1, 1], x.len())?;
            // What it only adds it adds in one order: the same bits.
            let made: Vec<u32> = bytemuck::pod_collect_to_vec(&made);
            worst = worst.max(error(&expected, &got)).max(self.differs(&residual, &made)?);
        }
        Ok(worst)
    }

    pub(super) fn part_norm(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (parts, offset, width) = (2, 8, 11);
        let (mut x, weight) = (v.floats(rows * H), v.floats(12));
        x.iter_mut().skip(offset + width).step_by(12).for_each(|value| *value = 0.0);
        let (stride4, offset4, part4) = (H4 as u32, offset as u32 / 4, 3);
        let p = params::PartNorm { stride4, offset4, part4, width: width as u32, eps: 1e-6 };
        let mut expected = x.clone();
        reference::part_norm(&p, parts, &weight, &mut expected);
        let buffers = [&self.up(&weight)?, &self.up(&x)?];
        let groups = [parts as u32, rows as u32, 1];
        let got = self.run(Kernel::PartNorm, Variant::default(), &p, &buffers, groups, x.len())?;
        Ok(error(&expected, &got))
    }

    pub(super) fn clip(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let x = v.floats(rows * H);
        let p = params::Clip { width4: H4 as u32, limit: 0.5 };
        let mut expected = x.clone();
        reference::clip(&p, &mut expected);
        let groups = [self.columns(H4), rows as u32, 1];
        let got = self.run(Kernel::Clip, Variant::default(), &p, &[&self.up(&x)?], groups, x.len())?;
        Ok(error(&expected, &got))
    }

    pub(super) fn rope(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (heads, half) = (3, 4);
        let (x, turns) = (v.floats(rows * H), v.floats(2 * rows * half));
        let turns: Vec<[f32; 2]> = turns.chunks_exact(2).map(|t| [t[0], t[1]]).collect();
        let (offset, head, first) = (2, 11, 1);
        let p = params::Rope {
            rows: rows as u32,
            heads,
            stride: H as u32,
            offset,
            head,
            first,
            half: half as u32,
        };
        let mut expected = x.clone();
        reference::rope(&p, &turns, &mut expected);
        let buffers = [&self.up(&turns)?, &self.up(&x)?];
        let groups = [(heads * half as u32).div_ceil(self.gpu.workgroup()), rows as u32, 1];
        let got = self.run(Kernel::Rope, Variant::default(), &p, &buffers, groups, x.len())?;
        Ok(error(&expected, &got))
    }

    pub(super) fn linear(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let mut worst = 0f64;
        // Whole rows with all that may be added; then two heads on parts of rows.
        for heads in [1, 2] {
            let (x_stride4, y_offset4) = if heads == 1 { (H4, 0) } else { (2 * H4 + 1, 3) };
            let y_stride4 = heads * N4 + y_offset4;
            let x = v.floats(rows * 4 * x_stride4);
            let (weights, w) = self.matrix(variant, &v.floats(heads * N * H), (N, H))?;
            let (bias, residual) = (v.floats(heads * N), v.floats(rows * 4 * y_stride4));
            let p = params::Linear {
                rows: rows as u32,
                k4: H4 as u32,
                n4: N4 as u32,
                w_units: variant.weights.units(H).0 as u32,
                w_stride: variant.weights.units(H).1 as u32,
                x_stride4: x_stride4 as u32,
                x_head4: H4 as u32,
                y_stride4: y_stride4 as u32,
                y_offset4: y_offset4 as u32,
                y_head4: N4 as u32,
                has_bias: 1,
                has_residual: u32::from(heads == 1),
                scale: 0.75,
            };
            let mut expected = vec![0.0; rows * 4 * y_stride4];
            reference::linear(&p, heads, &x, &w, &bias, &residual, &mut expected);
            let out = self.up(&vec![0f32; expected.len()])?;
            let buffers = [&self.up(&x)?, &weights, &self.up(&bias)?, &self.up(&residual)?, &out];
            let groups = [rows.div_ceil(variant.tile_rows()) as u32, self.matrix_columns(N4), heads as u32];
            let got = self.run(Kernel::Linear, variant, &p, &buffers, groups, expected.len())?;
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn attention(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let blocks = 6;
        let table: Vec<u32> = (0..2 * blocks as u32).rev().collect();
        let positions = v.below(blocks * KV_BLOCK, rows);
        let query = |(i, position)| Query { position, table_row: i as u32 % 2 };
        let queries: Vec<Query> = positions.into_iter().enumerate().map(query).collect();
        let (d4, v4) = if variant.values == exflow_shaders::Values::Wide { (75, 70) } else { (D4, D4) };
        let mut worst = 0f64;
        // A key head each; shared key heads in a window with sinks; values that are a part of the keys.
        for (heads, group, window, has_sinks, latent) in
            [(3, 1, u32::MAX, 0, false), (4, 2, 37, 1, false), (3, 3, u32::MAX, 0, true)]
        {
            let kv_heads = heads / group;
            let cache4 = kv_heads * d4 + if latent { 0 } else { kv_heads * v4 };
            let q_stride4 = heads * d4 + cache4;
            let (q, slots) = (v.floats(rows * 4 * q_stride4), 2 * blocks * KV_BLOCK);
            let (packed, cache) = self.cache(variant, &v.floats(slots * 4 * cache4), 4 * cache4)?;
            let sinks = v.floats(heads);
            let p = params::Attention {
                group: group as u32,
                d4: d4 as u32,
                v4: if latent { v4 as u32 - 1 } else { v4 as u32 },
                q_stride4: q_stride4 as u32,
                cache_stride4: cache4 as u32,
                v_offset4: if latent { 0 } else { (kv_heads * d4) as u32 },
                v_head4: v4 as u32,
                table_stride: blocks as u32,
                window,
                has_sinks,
                scale: 0.4,
            };
            let mut expected = vec![0.0; rows * heads * 4 * p.v4 as usize];
            reference::attention(&p, heads, &q, &cache, &queries, &table, &sinks, &mut expected);
            let out = self.up(&vec![0f32; expected.len()])?;
            let (q, sinks) = (self.up(&q)?, self.up(&sinks)?);
            let buffers = [&q, &packed, &self.up(&queries)?, &self.up(&table)?, &sinks, &out];
            let groups = [heads as u32, rows as u32, 1];
            let got = self.run(Kernel::Attention, variant, &p, &buffers, groups, expected.len())?;
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn kv_append(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let source = v.floats(rows * 3 * KV);
        let slots: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % 80).collect();
        let (width4, stride4, offset4) = (2 * KV as u32 / 4, 3 * KV as u32 / 4, KV as u32 / 4);
        let p = params::KvAppend { rows: rows as u32, width4, stride4, offset4 };
        let mut expected = vec![0; 80 * variant.cache.words(2 * KV)];
        reference::kv_append(&p, variant.cache, &source, &slots, &mut expected);
        let out = match variant.image {
            true => self.gpu.cache("selftest", expected.len() as u64, variant.cache.texel_words())?,
            false => self.up(&vec![0u32; expected.len()])?,
        };
        let buffers = [&self.up(&source)?, &self.up(&slots)?, &out];
        let groups = [self.columns(width4 as usize), rows as u32, 1];
        let got = self.run::<_, u32>(Kernel::KvAppend, variant, &p, &buffers, groups, expected.len())?;
        Ok(f64::from(u8::from(got != expected)))
    }

    pub(super) fn argmax(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (vocab, stride) = (257, 260);
        let mut logits = v.floats(rows * stride);
        (logits[200], logits[33]) = (2.0, 2.0); // a tie in the first row, which the lower index wins
        let p = params::Argmax { vocab: vocab as u32, stride: stride as u32 };
        let mut expected = vec![0u32; rows];
        reference::argmax(&p, &logits, &mut expected);
        let out = self.up(&vec![0u32; rows])?;
        let buffers = [&self.up(&logits)?, &out];
        let got: Vec<u32> =
            self.run(Kernel::Argmax, Variant::default(), &p, &buffers, [rows as u32, 1, 1], rows)?;
        Ok(if got == expected { 0.0 } else { 1.0 })
    }

    pub(super) fn probe(&self, variant: Variant, rows: usize) -> Result<f64, EngineError> {
        let p = params::Probe { rounds: rows as u32, factor: 0.5, bytes: 0x01fe_037f };
        let lanes = 2 * self.gpu.workgroup() as usize;
        let mut expected = vec![[0f32; 4]; lanes];
        reference::probe(&p, variant.weights, &mut expected);
        let out = self.up(&expected.iter().map(|_| [0f32; 4]).collect::<Vec<_>>())?;
        let got = self.run::<_, f32>(Kernel::Probe, variant, &p, &[&out], [2, 1, 1], 4 * lanes)?;
        Ok(error(bytemuck::cast_slice(&expected), &got))
    }
}

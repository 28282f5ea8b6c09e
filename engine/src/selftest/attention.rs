//! Attention, whole and in splits.

use super::{Bench, D4, Values, error};
use crate::EngineError;
use exflow_shaders::params::{self, Query};
use exflow_shaders::{ATTENTION_SPLIT, KV_BLOCK, Kernel, Variant, reference};

impl Bench {
    pub(super) fn attention(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let blocks = 18; // more than a split
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
            // Rows of one case are a multiple of 1 KiB, and lie apart.
            let cache4 = if has_sinks == 1 { cache4.next_multiple_of(128) } else { cache4 };
            let q_stride4 = heads * d4 + cache4;
            let (q, slots) = (v.floats(rows * 4 * q_stride4), 2 * blocks * KV_BLOCK);
            // Head by head where their rows are no more than that, as in a decoder.
            let form = variant.cache;
            let heads_alone = !latent && d4 == v4 && has_sinks == 0 && form != exflow_shaders::Cache::Q8;
            let whole = form.stride(4 * cache4) / form.texel_words() as usize;
            let part4 = if heads_alone { d4 } else { whole };
            let (packed, cache) = self.cache(variant, &v.floats(slots * 4 * cache4), (4 * cache4, part4))?;
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
                part4: part4 as u32,
                scale: 0.4,
            };
            let mut expected = vec![0.0; rows * heads * 4 * p.v4 as usize];
            reference::attention(&p, heads, &q, &cache, &queries, &table, &sinks, &mut expected);
            let out = self.up(&vec![0f32; expected.len()])?;
            let (q, sinks) = (self.up(&q)?, self.up(&sinks)?);
            let (seen, table) = (self.up(&queries)?, self.up(&table)?);
            let buffers = [&q, &packed, &seen, &table, &sinks, &out];
            let splits = if variant.split { (blocks * KV_BLOCK).div_ceil(ATTENTION_SPLIT) } else { 1 };
            let groups = [heads as u32, rows as u32, splits as u32];
            let got = match variant.split {
                false => self.run(Kernel::Attention, variant, &p, &buffers, groups, expected.len())?,
                true => {
                    let parts = vec![0f32; rows * heads * splits * 4 * (1 + p.v4 as usize)];
                    let parts = self.up(&parts)?;
                    let [q, cache, queries, table, sinks, out] = buffers;
                    let into = [q, cache, queries, table, sinks, &parts];
                    self.run::<_, f32>(Kernel::Attention, variant, &p, &into, groups, 1)?;
                    let p = params::AttentionMerge { v4: p.v4, splits: splits as u32, window, has_sinks };
                    let groups = [heads as u32, rows as u32, 1];
                    let buffers = [&parts, queries, sinks, out];
                    self.run(Kernel::AttentionMerge, variant, &p, &buffers, groups, expected.len())?
                }
            };
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn attention_merge(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (heads, splits, v4) = (3, 4, 35);
        let positions = v.below(splits * ATTENTION_SPLIT, rows);
        let queries: Vec<Query> =
            positions.into_iter().map(|position| Query { position, table_row: 0 }).collect();
        let mut parts = v.floats(rows * heads * splits * 4 * (1 + v4));
        // Denominators are sums of what is above 0.
        parts.iter_mut().skip(1).step_by(4 * (1 + v4)).for_each(|part| *part = part.abs() + 0.1);
        let sinks = v.floats(heads);
        let mut worst = 0f64;
        for (window, has_sinks) in [(u32::MAX, 0), (300, 1)] {
            let p = params::AttentionMerge { v4: v4 as u32, splits: splits as u32, window, has_sinks };
            let mut expected = vec![0.0; rows * heads * 4 * v4];
            reference::attention_merge(&p, heads, &parts, &queries, &sinks, &mut expected);
            let out = self.up(&vec![0f32; expected.len()])?;
            let buffers = [&self.up(&parts)?, &self.up(&queries)?, &self.up(&sinks)?, &out];
            let (kernel, groups) = (Kernel::AttentionMerge, [heads as u32, rows as u32, 1]);
            let got = self.run(kernel, Variant::default(), &p, &buffers, groups, expected.len())?;
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }
}

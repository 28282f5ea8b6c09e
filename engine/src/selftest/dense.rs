//! Kernels that every row passes: embedding, norms, products, head.

use super::{Bench, H, H4, N4, Values, WIDTH, error};
use crate::EngineError;
use exflow_shaders::params::{self, Draw};
use exflow_shaders::reference::{self, Factors};
use exflow_shaders::{Cache, Columns, Kernel, NO_SLOT, Variant};

impl Bench {
    pub(super) fn embed(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (wte, wpe) = (v.floats(44 * H), v.floats(70 * H));
        let tokens: Vec<[u32; 2]> =
            v.below(42, rows).into_iter().enumerate().map(|(i, id)| [id, i as u32]).collect();
        let mut worst = 0f64;
        let sampled = v.below(42, rows);
        // The whole table; chunks of it, with tokens before and behind them.
        for (first, height, has_positions, follows, scale) in [
            (0, 44, 1, 0, 1.0),
            (0, 44, 0, 0, 12.0),
            (0, 44, 1, 1, 1.0),
            (8, 28, 1, 0, 3.0),
            (32, 12, 0, 1, 2.0),
        ] {
            let (from, height4) = (first as usize * H, height as u32 / 4);
            let wte = &wte[from..from + height * H];
            let (packed, _) = self.matrix(variant, wte, (height, H))?;
            let (rows32, width4) = (rows as u32, H4 as u32);
            let p = params::Embed { rows: rows32, width4, first, height4, has_positions, follows, scale };
            let mut expected = v.floats(rows * H);
            let out = self.up(&expected)?;
            reference::embed(&p, &tokens, wte, &wpe, &sampled, &mut expected);
            let buffers = [&self.up(&tokens)?, &packed, &self.up(&wpe)?, &self.up(&sampled)?, &out];
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

    pub(super) fn linear(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let mut worst = 0f64;
        if variant.keeps {
            return self.linear_kept(variant, rows, v);
        }
        // More than one workgroup makes.
        let n4 = 3 * N4;
        let n = 4 * n4;
        // Whole rows with all that may be added; then two heads on parts of rows.
        for heads in [1, 2] {
            let (x_stride4, y_offset4) = if heads == 1 { (H4, 0) } else { (2 * H4 + 1, 3) };
            let y_stride4 = heads * n4 + y_offset4;
            let x = v.floats(rows * 4 * x_stride4);
            let (weights, w) = self.matrix(variant, &v.floats(heads * n * H), (n, H))?;
            let (bias, residual) = (v.floats(heads * n), v.floats(rows * 4 * y_stride4));
            let p = params::Linear {
                rows: rows as u32,
                k4: H4 as u32,
                n4: n4 as u32,
                w_units: variant.weights.units(H).0 as u32,
                w_stride: variant.weights.units(H).1 as u32,
                x_stride4: x_stride4 as u32,
                x_head4: H4 as u32,
                y_stride4: y_stride4 as u32,
                y_offset4: y_offset4 as u32,
                y_head4: n4 as u32,
                has_bias: 1,
                has_residual: u32::from(heads == 1),
                scale: 0.75,
                ..Default::default()
            };
            let mut expected = vec![0.0; rows * 4 * y_stride4];
            reference::linear(&p, (heads, Factors::from(variant)), &x, &w, &bias, &residual, &mut expected);
            let out = self.up(&vec![0f32; expected.len()])?;
            let buffers = [&self.up(&x)?, &weights, &self.up(&bias)?, &self.up(&residual)?, &out];
            let groups = [
                rows.div_ceil(variant.tile_rows()) as u32,
                self.matrix_groups(Kernel::Linear, variant, n4),
                heads as u32,
            ];
            let got = self.run(Kernel::Linear, variant, &p, &buffers, groups, expected.len())?;
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    /// Queries, keys and values: of heads that turn; as they are.
    fn linear_kept(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let slots: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % 80).collect();
        let mut worst = 0f64;
        for (heads, d4, half4) in [(2, 4, 2), (3, 5, 0)] {
            // Both halves of a pair are a lane's own: heads that turn have two vec4s a lane, as in a decoder.
            let columns = if half4 > 0 { Columns::Two } else { variant.columns };
            let variant = Variant { columns, ..variant };
            let (n4, cache4) = ((heads + 2) * d4, 2 * d4);
            let (x, bias) = (v.floats(rows * H), v.floats(4 * n4));
            let (weights, w) = self.matrix(variant, &v.floats(4 * n4 * H), (4 * n4, H))?;
            let turns = v.floats(rows * 8 * half4.max(1));
            let (w_units, w_stride) = variant.weights.units(H);
            let p = params::Linear {
                rows: rows as u32,
                k4: H4 as u32,
                n4: n4 as u32,
                w_units: w_units as u32,
                w_stride: w_stride as u32,
                x_stride4: H4 as u32,
                y_stride4: n4 as u32,
                has_bias: 1,
                scale: 0.75,
                kept_from4: (heads * d4) as u32,
                turned4: if half4 > 0 { ((heads + 1) * d4) as u32 } else { 0 },
                half4: half4 as u32,
                part4: d4 as u32,
                ..Default::default()
            };
            let mut expected = vec![0.0; rows * 4 * n4];
            reference::linear(&p, (1, Factors::from(variant)), &x, &w, &bias, &[], &mut expected);
            let place = params::Place {
                stride4: n4 as u32,
                d4: d4 as u32,
                q_heads: heads as u32,
                k_heads: 1,
                q_span: 1,
                k_span: 1,
                cache4: cache4 as u32,
                appends: 1,
                half: 4 * half4 as u32,
                part4: d4 as u32,
                ..Default::default()
            };
            let (parts, form, words) = (heads + 2, variant.cache, 80 * variant.cache.stride(4 * cache4));
            let pairs: Vec<[f32; 2]> = turns.chunks_exact(2).map(|t| [t[0], t[1]]).collect();
            let mut kept = vec![0; words];
            reference::place(&place, parts, form, &[], &[], &pairs, &slots, &mut expected, &mut kept);
            let out = match variant.image {
                true => self.gpu.cache("selftest", words as u64, form.texel_words())?,
                false => self.up(&vec![0u32; words])?,
            };
            let y = self.up(&vec![0f32; expected.len()])?;
            let from = [&self.up(&x)?, &weights, &self.up(&bias)?];
            let to = [&self.up(&turns)?, &y, &self.up(&slots)?, &out];
            let buffers = [&from[..], &to].concat();
            let groups = [
                rows.div_ceil(variant.tile_rows()) as u32,
                self.matrix_groups(Kernel::Linear, variant, n4),
                1,
            ];
            let got = self.run::<_, u32>(Kernel::Linear, variant, &p, &buffers, groups, words)?;
            let mut made = self.read(&y, expected.len())?;
            worst = worst.max(error(&expected, &made));
            // What was made is what went into the cache, word for word.
            let still = params::Place { half: 0, ..place };
            reference::place(&still, parts, form, &[], &[], &[], &slots, &mut made, &mut kept);
            worst = worst.max(f64::from(u8::from(got != kept)));
        }
        Ok(worst)
    }

    pub(super) fn place(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let slots: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % 80).collect();
        let head = params::Place {
            offset4: 1,
            q_heads: 4,
            k_heads: 2,
            q_span: 1,
            k_span: 1,
            appends: 1,
            eps: 1e-5,
            ..Default::default()
        };
        let cases = [
            // Heads normed one by one, of whose columns some turn.
            (params::Place { d4: 8, normed4: 8, normed: 30, norms_queries: 1, first: 2, half: 7, ..head }, 8),
            // Projections normed as one.
            (
                params::Place {
                    d4: 12,
                    q_span: 4,
                    k_span: 2,
                    normed4: 12,
                    normed: 48,
                    norms_queries: 1,
                    clips: 1,
                    limit: 0.7,
                    half: 24,
                    ..head
                },
                3,
            ),
            // A latent and its rotary key: no values.
            (params::Place { d4: 8, k_heads: 1, normed4: 5, normed: 18, first: 20, half: 6, ..head }, 5),
            // Positions alone.
            (params::Place { d4: 16, half: 32, ..head }, 8),
            // What comes from elsewhere.
            (params::Place { d4: 13, q_heads: 0, k_heads: 0, ..head }, 1),
        ];
        let mut worst = 0f64;
        for (p, parts) in cases {
            let q_parts = (p.q_heads / p.q_span) as usize;
            let heads = p.q_heads as usize + (parts - q_parts) * p.k_span as usize;
            let d4 = p.d4 as usize;
            let cache4 = (heads - p.q_heads as usize) * d4;
            let stride4 = heads * d4 + 2;
            // Rows in parts of a head, or whole.
            let form = variant.cache;
            let whole = form.stride(4 * cache4) / form.texel_words() as usize;
            let part4 = if form == Cache::Q8 || parts == 3 { whole } else { d4 } as u32;
            let p = params::Place { stride4: stride4 as u32, cache4: cache4 as u32, part4, ..p };
            let mut x = v.floats(rows * 4 * stride4);
            for column in (p.normed as usize)..4 * p.normed4 as usize {
                for head in 0..heads {
                    let at = 4 * (p.offset4 as usize + head * d4) + column;
                    x.iter_mut().skip(at).step_by(4 * stride4).for_each(|value| *value = 0.0);
                }
            }
            let q_weight = v.floats(4 * (p.q_span * p.normed4).max(1) as usize);
            let k_weight = v.floats(4 * (p.k_span * p.normed4).max(1) as usize);
            let turns = v.floats(2 * rows * (p.half as usize).max(1));
            let turns: Vec<[f32; 2]> = turns.chunks_exact(2).map(|t| [t[0], t[1]]).collect();
            let mut expected = x.clone();
            let words = 80 * form.stride(4 * cache4);
            let lists = (&q_weight[..], &k_weight[..], &turns[..], &slots[..]);
            reference::place(
                &p,
                parts,
                form,
                lists.0,
                lists.1,
                lists.2,
                lists.3,
                &mut expected,
                &mut vec![0; words],
            );
            let out = match variant.image {
                true => self.gpu.cache("selftest", words as u64, form.texel_words())?,
                false => self.up(&vec![0u32; words])?,
            };
            let residual = self.up(&x)?;
            let weights = [&self.up(&q_weight)?, &self.up(&k_weight)?];
            let rest = [&self.up(&turns)?, &self.up(&slots)?, &residual, &out];
            let buffers = [&weights[..], &rest].concat();
            let got = self.run::<_, u32>(
                Kernel::Place,
                variant,
                &p,
                &buffers,
                [parts as u32, rows as u32, 1],
                words,
            )?;
            let mut made = self.read(&residual, x.len())?;
            worst = worst.max(error(&expected, &made));
            // What was made is what went into the cache, word for word.
            let still = params::Place { normed4: 0, clips: 0, half: 0, ..p };
            let mut kept = vec![0; words];
            reference::place(&still, parts, form, lists.0, lists.1, &[], lists.3, &mut made, &mut kept);
            worst = worst.max(f64::from(u8::from(got != kept)));
        }
        Ok(worst)
    }

    pub(super) fn argmax(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (vocab, stride) = (257, 260);
        let mut logits = v.floats(rows * stride);
        // In the first row a tie, which the lower index wins, and more behind the last token, which counts nothing.
        (logits[200], logits[33], logits[vocab]) = (2.0, 2.0, 3.0);
        let p = params::Argmax { vocab: vocab as u32, stride: stride as u32 };
        let mut expected = vec![0u32; rows];
        reference::argmax(&p, &logits, &mut expected);
        let out = self.up(&vec![0u32; rows])?;
        let buffers = [&self.up(&logits)?, &out];
        let got: Vec<u32> = self.run(Kernel::Argmax, variant, &p, &buffers, [rows as u32, 1, 1], rows)?;
        Ok(if got == expected { 0.0 } else { 1.0 })
    }

    /// Every row with other filters; some with many equal logits, some without a draw.
    pub(super) fn sample(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (vocab, stride) = (1_003, 1_004);
        let mut logits = v.floats(rows * stride);
        for (row, logits) in logits.chunks_mut(stride).enumerate() {
            let step = if row % 3 == 0 { 0.5 } else { 1e-4 };
            logits.iter_mut().for_each(|x| *x = (*x * 6.0 / step).round() * step);
            logits[vocab] = 1e9; // no token
        }
        let mut draw = |row: usize| Draw {
            scale: [0.7, 1.44, 5.0, 0.0][row / 2 % 4],
            top_k: [0, 1, 40, 200, vocab as u32, 5_000][row % 6],
            top_p: [1 << 24, 15 << 20, 1, 1 << 23][row / 3 % 4],
            min_p: [0, 1 << 24, 1 << 30][row % 3],
            unit: v.next() << 1,
        };
        let mut draws: Vec<Draw> = (0..rows).map(&mut draw).collect();
        draws[rows / 2].unit = u32::MAX;
        let p = params::Sample { vocab: vocab as u32, stride: stride as u32 };
        let mut expected: Vec<u32> = (0..rows as u32).collect();
        let out = self.up(&expected)?;
        reference::sample(&p, &logits, &draws, &mut expected);
        let buffers = [&self.up(&logits)?, &self.up(&draws)?, &out];
        let got: Vec<u32> =
            self.run(Kernel::Sample, Variant::default(), &p, &buffers, [rows as u32, 1, 1], rows)?;
        Ok(if got == expected { 0.0 } else { 1.0 })
    }

    pub(super) fn matrix_probe(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let side = variant.tile_rows();
        // Small whole numbers: sums are exact in any order.
        let factors: Vec<f32> = v.below(9, 2 * side * side).iter().map(|&n| n as f32 - 4.0).collect();
        let halves: Vec<u16> = factors.iter().map(|&v| half::f16::from_f32(v).to_bits()).collect();
        let count = 2 * 4 * side * side;
        let mut expected: Vec<f32> = v.below(100, count).iter().map(|&n| n as f32).collect();
        let p = params::MatrixProbe { rounds: rows as u32, subgroups_at: count as u32 };
        let out = self.up(&[&expected[..], &[0.0]].concat())?;
        reference::matrix_probe(&p, side, &factors, &mut expected);
        let buffers = [&self.up(&halves)?, &out];
        let mut got = self.run::<_, f32>(Kernel::MatrixProbe, variant, &p, &buffers, [2, 1, 1], count + 1)?;
        let subgroups = got.pop().unwrap_or_default();
        Ok(error(&expected, &got).max(f64::from(u8::from(subgroups < 1.0))))
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

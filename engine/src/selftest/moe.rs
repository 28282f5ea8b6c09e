//! Kernels of a MoE layer: router, lists of pairs, experts.

use super::{Bench, EXPERTS, H, H4, N, N4, Values, WIDTH, error, tiles_zero};
use crate::EngineError;
use crate::gpu::{Buffer, Recording};
use bytemuck::Pod;
use exflow_shaders::params::{self, Pair, Tile, score};
use exflow_shaders::reference::{self, Factors};
use exflow_shaders::{Kernel, Variant};

impl Bench {
    pub(super) fn router(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let experts = 12;
        let (mut x, mut constants) = (v.floats(rows * H), v.floats((2 + experts) * H + 2 * experts));
        for column in WIDTH..H {
            let norms = constants[..2 * H].iter_mut();
            let beyond = x.iter_mut().skip(column).step_by(H).chain(norms.skip(column).step_by(H));
            beyond.for_each(|value| *value = 0.0);
        }
        let plain = params::Router {
            width: WIDTH as u32,
            h4: H4 as u32,
            centred: 0,
            eps: 1e-5,
            experts: experts as u32,
            top_k: 3,
            score: score::SOFTMAX,
            renormalise: 1,
            has_bias: 0,
            has_correction: 0,
            groups: 1,
            groups_kept: 1,
            group_best: 1,
            scale: 1.0,
            threshold: 0.0,
            lists: u32::from(rows == 1),
            up_groups: 4,
            down_groups: 6,
        };
        let cases = [
            plain,
            params::Router { renormalise: 0, groups: 4, groups_kept: 2, scale: 16.0, centred: 1, ..plain },
            params::Router { score: score::SOFTMAX_OF_CHOSEN, has_bias: 1, renormalise: 0, ..plain },
            params::Router {
                score: score::SIGMOID,
                has_correction: 1,
                groups: 4,
                groups_kept: 3,
                group_best: 2,
                scale: 2.5,
                ..plain
            },
            params::Router { score: score::SPARSEMIXER, top_k: 2, renormalise: 0, threshold: 0.2, ..plain },
        ];
        let mut worst = 0f64;
        for p in cases {
            let (count, top_k) = (rows * p.top_k as usize, p.top_k as usize);
            let (mut chosen, mut weights) = (vec![0u32; count], vec![0.0; count]);
            let (mut pairs, mut tiles) = (vec![Pair::default(); top_k], vec![Tile::default(); top_k]);
            let (mut launches, mut normed) = ([0; 6], vec![0.0; rows * H]);
            let lists = (self.up(&pairs)?, self.up(&tiles)?, self.up(&launches)?);
            let (ids, out) = (self.up(&vec![0u32; count])?, self.up(&vec![0f32; count])?);
            let (row, y) = (self.up(&x)?, self.up(&normed)?);
            let held = match variant.image {
                true => self.gpu.image_of::<4>("selftest", bytemuck::pod_collect_to_vec(&constants)),
                false => self.up(&constants)?,
            };
            let buffers = [&held, &ids, &out, &lists.0, &lists.1, &lists.2, &row, &y];
            let (chosen_too, weights_too) = (&mut chosen, &mut weights);
            reference::router(
                &p,
                &constants,
                chosen_too,
                weights_too,
                &mut pairs,
                &mut tiles,
                &mut launches,
                &mut x,
                &mut normed,
            );
            let got =
                self.run::<_, f32>(Kernel::Router, variant, &p, &buffers, [rows as u32, 1, 1], rows * H)?;
            worst = worst.max(error(&normed, &got)).max(self.differs(&ids, &chosen)?);
            // Weights that differ in the last bits stand in the pairs too.
            let of_pairs = |pairs: &[Pair]| pairs.iter().map(|pair| pair.weight).collect::<Vec<_>>();
            let got_pairs: Vec<Pair> = self.read(&lists.0, top_k)?;
            worst = worst.max(error(&weights, &self.read(&out, count)?));
            worst = worst.max(error(&of_pairs(&pairs), &of_pairs(&got_pairs)));
            let moved = got_pairs
                .iter()
                .zip(&pairs)
                .any(|(a, b)| (a.row, a.slot, a.expert) != (b.row, b.slot, b.expert));
            worst = worst.max(f64::from(u8::from(moved)));
            worst = worst.max(self.differs(&lists.1, bytemuck::cast_slice(&tiles))?);
            worst = worst.max(self.differs(&lists.2, &launches)?);
        }
        Ok(worst)
    }

    pub(super) fn shared_gate(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (x, w) = (v.floats(rows * H), v.floats(H));
        let pair = |i: usize| Pair { row: (i % rows) as u32, slot: i as u32, weight: 1.0, expert: 0 };
        let mut expected: Vec<Pair> = (0..rows + 3).map(pair).collect();
        let buffer = self.up(&expected)?;
        let p = params::SharedGate { h4: H4 as u32, first: 3, count: rows as u32 };
        reference::shared_gate(&p, &x, &w, &mut expected);
        let groups = [self.columns(rows), 1, 1];
        let buffers = [&self.up(&x)?, &self.up(&w)?, &buffer];
        let got: Vec<Pair> =
            self.run(Kernel::SharedGate, Variant::default(), &p, &buffers, groups, rows + 3)?;
        let weights = |pairs: &[Pair]| pairs.iter().map(|pair| pair.weight).collect::<Vec<_>>();
        let moved = got.iter().zip(&expected).any(|(a, b)| (a.row, a.slot) != (b.row, b.slot));
        Ok(error(&weights(&expected), &weights(&got)).max(f64::from(u8::from(moved))))
    }

    pub(super) fn expert_up(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let (pairs, tiles) = self.lists(variant, rows, v);
        let matrices = variant.activation.matrices();
        // Sums beyond the limit, so that clamps act.
        let x: Vec<f32> = v.floats(rows * H).iter().map(|x| 3.0 * x).collect();
        let (w1, b1) = (v.floats(EXPERTS * matrices * N * H), v.floats(EXPERTS * matrices * N));
        let mut worst = 0f64;
        for (has_bias, chunks) in [(0, &CHUNKS[..1]), (1, &CHUNKS[1..])] {
            let (w_units, w_stride) = units(variant, H);
            let (h4, i4, first_tile) = (H4 as u32, N4 as u32, 0);
            let mut expected = vec![0.0; rows * N];
            let out = self.up(&expected)?;
            let lists = (self.up(&pairs)?, self.up(&tiles)?);
            let mut got = Vec::new();
            for &(first_expert, experts) in chunks {
                let (limit, of) = (5.5, |each: usize| chunk(first_expert, experts, each));
                let p = params::ExpertUp {
                    h4,
                    i4,
                    w_units,
                    w_stride,
                    first_tile,
                    has_bias,
                    first_expert,
                    experts,
                    limit,
                };
                let (weights, w1) = self.matrix(variant, &w1[of(matrices * N * H)], (N, H))?;
                let b1 = &b1[of(matrices * N)];
                let kind = (variant.activation, Factors::from(variant));
                reference::expert_up(&p, kind, &pairs, &tiles, &x, &w1, b1, &mut expected);
                let buffers = [&self.up(&x)?, &weights, &lists.0, &lists.1, &self.up(b1)?, &out];
                let groups = [tiles.len() as u32, self.matrix_groups(Kernel::ExpertUp, variant, N4), 1];
                got = self.run(Kernel::ExpertUp, variant, &p, &buffers, groups, rows * N)?;
            }
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn expert_down(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let (pairs, tiles) = self.lists(variant, rows, v);
        let (a, b2) = (v.floats(rows * N), v.floats(EXPERTS * H));
        let w2 = v.floats(EXPERTS * H * N);
        let mut worst = 0f64;
        for (has_bias, scale, chunks) in [(0, 0.22, &CHUNKS[..1]), (1, 1.0, &CHUNKS[1..])] {
            let (w_units, w_stride) = units(variant, N);
            let (h4, i4, first_tile) = (H4 as u32, N4 as u32, 0);
            let mut expected = vec![0.0; rows * H];
            let out = self.up(&expected)?;
            let lists = (self.up(&pairs)?, self.up(&tiles)?);
            let mut got = Vec::new();
            for &(first_expert, experts) in chunks {
                let of = |each: usize| chunk(first_expert, experts, each);
                let p = params::ExpertDown {
                    i4,
                    h4,
                    w_units,
                    w_stride,
                    first_tile,
                    has_bias,
                    first_expert,
                    experts,
                    scale,
                };
                let (weights, w2) = self.matrix(variant, &w2[of(H * N)], (H, N))?;
                let b2 = &b2[of(H)];
                reference::expert_down(
                    (&p, Factors::from(variant)),
                    &pairs,
                    &tiles,
                    &a,
                    &w2,
                    b2,
                    &mut expected,
                );
                let buffers = [&self.up(&a)?, &weights, &lists.0, &lists.1, &self.up(b2)?, &out];
                let groups = [tiles.len() as u32, self.matrix_groups(Kernel::ExpertDown, variant, H4), 1];
                got = self.run(Kernel::ExpertDown, variant, &p, &buffers, groups, rows * H)?;
            }
            worst = worst.max(error(&expected, &got));
        }
        Ok(worst)
    }

    pub(super) fn expert_permute(
        &self,
        variant: Variant,
        rows: usize,
        v: &mut Values,
    ) -> Result<f64, EngineError> {
        let (chosen, weights) = (v.below(EXPERTS, rows * 2), v.floats(rows * 2));
        let (pairs, experts) = (2 * rows as u32, EXPERTS as u32);
        let p = params::ExpertPermute { pairs, top_k: 2, experts, up_groups: 4, down_groups: 6 };
        let mut list = vec![Pair::default(); rows * 2];
        let mut tiles = vec![Tile::default(); rows * 2];
        let mut launches = [0; 6];
        let tile_rows = variant.tile_rows();
        let count =
            reference::expert_permute(&p, tile_rows, &chosen, &weights, &mut list, &mut tiles, &mut launches);
        let (list_out, tiles_out) = (self.up(&vec![Pair::default(); rows * 2])?, self.up(&tiles_zero(rows))?);
        let out = self.up(&[0u32; 6])?;
        let buffers = [&self.up(&chosen)?, &self.up(&weights)?, &list_out, &tiles_out, &out];
        let got = self.run::<_, u32>(Kernel::ExpertPermute, variant, &p, &buffers, [1, 1, 1], 6)?;
        let wrong = f64::from(u8::from(got != launches));
        let wrong = wrong.max(self.differs(&list_out, bytemuck::cast_slice(&list))?);
        Ok(wrong.max(self.differs(&tiles_out, bytemuck::cast_slice(&tiles[..count]))?))
    }

    /// 1 where the buffer does not start with `expected`, else 0.
    pub(super) fn differs(&self, buffer: &Buffer, expected: &[u32]) -> Result<f64, EngineError> {
        let got: Vec<u32> = self.read(buffer, expected.len())?;
        Ok(if got == expected { 0.0 } else { 1.0 })
    }

    /// The first `count` elements of a buffer.
    pub(super) fn read<T: Pod>(&self, buffer: &Buffer, count: usize) -> Result<Vec<T>, EngineError> {
        let mut r = Recording::new(&self.gpu);
        r.read::<T>(buffer, 0, count);
        Ok(r.submit()?.fetch()?.pop().map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default())
    }

    /// Pairs of `rows` rows over the experts, sorted and cut, with reversed slots.
    pub(super) fn lists(&self, variant: Variant, rows: usize, v: &mut Values) -> (Vec<Pair>, Vec<Tile>) {
        let mut experts = v.below(EXPERTS, rows);
        experts.sort_unstable();
        let pair = |(i, &expert): (usize, &u32)| Pair {
            row: i as u32,
            slot: (rows - 1 - i) as u32,
            weight: 0.25 + i as f32 / 100.0,
            expert,
        };
        let pairs: Vec<Pair> = experts.iter().enumerate().map(pair).collect();
        let mut tiles = Vec::new();
        let mut first = 0;
        for group in pairs.chunk_by(|a, b| a.expert == b.expert) {
            for part in group.chunks(variant.tile_rows()) {
                tiles.push(Tile { expert: part[0].expert, first, count: part.len() as u32, pad: 0 });
                first += part.len() as u32;
            }
        }
        (pairs, tiles)
    }
}

/// Experts (the first, how many) whose matrices are bound together: all of them, or two launches.
const CHUNKS: [(u32, u32); 3] = [(0, EXPERTS as u32), (0, 2), (2, EXPERTS as u32 - 2)];

/// Where values of a chunk's experts stand, `each` for each expert.
fn chunk(first: u32, count: u32, each: usize) -> std::ops::Range<usize> {
    first as usize * each..(first + count) as usize * each
}

/// Units of weights in a row of `columns` columns, and units to the next row.
fn units(variant: Variant, columns: usize) -> (u32, u32) {
    let (units, stride) = variant.weights.units(columns);
    (units as u32, stride as u32)
}

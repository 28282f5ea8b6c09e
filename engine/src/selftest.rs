//! Every kernel against its twin on the CPU, on the devices of this machine.

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Recording, devices};
use bytemuck::Pod;
use exflow_shaders::params::{self, Pair, Query, Tile};
use exflow_shaders::{KV_BLOCK, Kernel, NO_SLOT, Variant, reference};
use serde::Serialize;
use std::cell::RefCell;

/// One kernel at one shape on one adapter.
#[derive(Debug, Clone, Serialize)]
pub struct KernelCheck {
    /// The adapter's name.
    pub adapter: String,
    /// The kernel's name.
    pub kernel: String,
    /// Variant and shape.
    pub case: String,
    /// The largest difference from the twin, relative to the largest value (0 or 1 for integers).
    pub max_error: f64,
    /// What may differ.
    pub tolerance: f64,
    /// Whether it does not.
    pub passed: bool,
}

/// Runs every variant of every kernel at several shapes, compares it with its twin and the variants
/// that sum in tiles with the plain one bit by bit, on the adapters that `adapter` names (all: `None`) and
/// tells `sink` of each; returns whether all passed.
pub fn selftest(adapter: Option<&str>, sink: &mut dyn FnMut(&KernelCheck)) -> Result<bool, EngineError> {
    let wanted: Vec<String> = match adapter {
        Some(name) => vec![name.to_owned()],
        None => devices().iter().map(|d| d.index.to_string()).collect(),
    };
    if wanted.is_empty() {
        Gpu::open(None, 0)?; // says what to install
    }
    let mut all = true;
    for name in wanted {
        let bench = Bench { gpu: Gpu::open(Some(&name), 0)?, last: RefCell::default() };
        for kernel in Kernel::ALL {
            for rows in [1, 7, 64, 65] {
                let mut bits = None;
                for &variant in kernel.variants() {
                    let mut check = bench.check(kernel, variant, rows)?;
                    let got = bench.last.take();
                    let plain = bits.get_or_insert_with(|| got.clone());
                    if kernel.sums_in_tiles() && *plain != got {
                        (check.max_error, check.passed) = (f64::INFINITY, false);
                        check.case += ": bits differ from the plain variant's";
                    }
                    all &= check.passed;
                    sink(&check);
                }
            }
        }
    }
    Ok(all)
}

/// f32 sums of a few hundred terms, in another order or with another rounding of `exp`.
const TOLERANCE: f64 = 2e-5;

struct Bench {
    gpu: Gpu,
    /// What the last launch wrote, byte for byte.
    last: RefCell<Vec<u8>>,
}

/// A fixed stream of values in -1..1 (a linear congruential generator; quality is no matter here).
struct Values(u64);

impl Values {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }

    fn below(&mut self, limit: usize, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.next() % limit as u32).collect()
    }
}

/// Odd widths: 9 vec4s of 34 columns, 5 experts, 3 heads of 12.
const H4: usize = 9;
const WIDTH: usize = 34;
const N4: usize = 11;
const EXPERTS: usize = 5;
const HEADS: usize = 3;
const D4: usize = 3;
const H: usize = 4 * H4;
const N: usize = 4 * N4;
const KV: usize = HEADS * 4 * D4;

impl Bench {
    fn check(&self, kernel: Kernel, variant: Variant, rows: usize) -> Result<KernelCheck, EngineError> {
        let mut values = Values(kernel as u64 * 1000 + rows as u64);
        let max_error = match kernel {
            Kernel::Embed => self.embed(rows, &mut values)?,
            Kernel::LayerNorm => self.layer_norm(rows, &mut values)?,
            Kernel::Linear => self.linear(variant, rows, &mut values)?,
            Kernel::KvAppend => self.kv_append(rows, &mut values)?,
            Kernel::Attention => self.attention(rows, &mut values)?,
            Kernel::Router => self.router(rows, &mut values)?,
            Kernel::ExpertPermute => self.expert_permute(variant, rows, &mut values)?,
            Kernel::ExpertUp => self.expert_up(variant, rows, &mut values)?,
            Kernel::ExpertDown => self.expert_down(variant, rows, &mut values)?,
            Kernel::Combine => self.combine(rows, &mut values)?,
            Kernel::Argmax => self.argmax(rows, &mut values)?,
        };
        let variant = if variant.tile8 { ", tile of 8" } else { "" };
        Ok(KernelCheck {
            adapter: self.gpu.name().to_owned(),
            kernel: kernel.name().to_owned(),
            case: format!("{rows} rows{variant}"),
            max_error,
            tolerance: TOLERANCE,
            passed: max_error <= TOLERANCE,
        })
    }

    fn up<T: Pod>(&self, data: &[T]) -> Result<Buffer, EngineError> {
        self.gpu.buffer_of("selftest", data)
    }

    /// Runs one launch and returns `count` elements of its last buffer.
    fn run<P: Pod, T: Pod>(
        &self,
        kernel: Kernel,
        variant: Variant,
        params: &P,
        buffers: &[&Buffer],
        groups: [u32; 3],
        count: usize,
    ) -> Result<Vec<T>, EngineError> {
        let mut r = Recording::new(&self.gpu);
        r.launch(kernel, variant, params, buffers, groups);
        if let Some(last) = buffers.last() {
            r.read::<T>(last, 0, count);
        }
        self.last.replace(r.submit()?.fetch()?.pop().unwrap_or_default());
        Ok(bytemuck::pod_collect_to_vec(&self.last.borrow()))
    }

    fn columns(&self, width4: usize) -> u32 {
        (width4 as u32).div_ceil(self.gpu.workgroup())
    }

    fn embed(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (wte, wpe) = (v.floats(17 * H), v.floats(70 * H));
        let tokens: Vec<[u32; 2]> =
            v.below(17, rows).into_iter().enumerate().map(|(i, id)| [id, i as u32]).collect();
        let p = params::Embed { rows: rows as u32, width4: H4 as u32 };
        let mut expected = vec![0.0; rows * H];
        reference::embed(&p, &tokens, &wte, &wpe, &mut expected);
        let out = self.up(&vec![0f32; rows * H])?;
        let buffers = [&self.up(&tokens)?, &self.up(&wte)?, &self.up(&wpe)?, &out];
        let groups = [self.columns(H4), rows as u32, 1];
        Ok(error(&expected, &self.run(Kernel::Embed, Variant::default(), &p, &buffers, groups, rows * H)?))
    }

    fn layer_norm(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let first = 2;
        let mut x = v.floats((rows + first) * H);
        let (mut weight, mut bias) = (v.floats(H), v.floats(H));
        for column in WIDTH..H {
            (weight[column], bias[column]) = (0.0, 0.0);
            (0..rows + first).for_each(|row| x[row * H + column] = 0.0);
        }
        let (width, width4, first_row) = (WIDTH as u32, H4 as u32, first as u32);
        let p = params::LayerNorm { rows: rows as u32, width, width4, first_row, eps: 1e-5 };
        let mut expected = vec![0.0; x.len()];
        reference::layer_norm(&p, &x, &weight, &bias, &mut expected);
        let out = self.up(&vec![0f32; x.len()])?;
        let buffers = [&self.up(&x)?, &self.up(&weight)?, &self.up(&bias)?, &out];
        let groups = [rows as u32, 1, 1];
        Ok(error(&expected, &self.run(Kernel::LayerNorm, Variant::default(), &p, &buffers, groups, x.len())?))
    }

    fn linear(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (x, w, bias, residual) = (v.floats(rows * H), v.floats(N * H), v.floats(N), v.floats(rows * N));
        let (k4, n4) = (H4 as u32, N4 as u32);
        let p = params::Linear { rows: rows as u32, k4, n4, has_bias: 1, has_residual: 1 };
        let mut expected = vec![0.0; rows * N];
        reference::linear(&p, &x, &w, &bias, &residual, &mut expected);
        let out = self.up(&vec![0f32; rows * N])?;
        let buffers = [&self.up(&x)?, &self.up(&w)?, &self.up(&bias)?, &self.up(&residual)?, &out];
        let groups = [self.columns(N4), rows.div_ceil(variant.tile_rows()) as u32, 1];
        Ok(error(&expected, &self.run(Kernel::Linear, variant, &p, &buffers, groups, rows * N)?))
    }

    fn kv_append(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let source = v.floats(rows * 3 * KV);
        let slots: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % 80).collect();
        let (width4, stride4, offset4) = (2 * KV as u32 / 4, 3 * KV as u32 / 4, KV as u32 / 4);
        let p = params::KvAppend { rows: rows as u32, width4, stride4, offset4 };
        let mut expected = vec![0.0; 80 * 2 * KV];
        reference::kv_append(&p, &source, &slots, &mut expected);
        let out = self.up(&vec![0f32; expected.len()])?;
        let buffers = [&self.up(&source)?, &self.up(&slots)?, &out];
        let groups = [self.columns(width4 as usize), rows as u32, 1];
        let count = expected.len();
        Ok(error(&expected, &self.run(Kernel::KvAppend, Variant::default(), &p, &buffers, groups, count)?))
    }

    fn attention(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let blocks = 6;
        let (q, cache) = (v.floats(rows * 3 * KV), v.floats(2 * blocks * KV_BLOCK * 2 * KV));
        let table: Vec<u32> = (0..2 * blocks as u32).rev().collect();
        let positions = v.below(blocks * KV_BLOCK, rows);
        let query = |(i, position)| Query { position, table_row: i as u32 % 2 };
        let queries: Vec<Query> = positions.into_iter().enumerate().map(query).collect();
        let (heads, d4, q_stride4) = (HEADS as u32, D4 as u32, 3 * KV as u32 / 4);
        let p = params::Attention { heads, d4, q_stride4, table_stride: blocks as u32, scale: 0.4 };
        let mut expected = vec![0.0; rows * KV];
        reference::attention(&p, &q, &cache, &queries, &table, &mut expected);
        let out = self.up(&vec![0f32; rows * KV])?;
        let buffers = [&self.up(&q)?, &self.up(&cache)?, &self.up(&queries)?, &self.up(&table)?, &out];
        let groups = [heads, rows as u32, 1];
        Ok(error(
            &expected,
            &self.run(Kernel::Attention, Variant::default(), &p, &buffers, groups, rows * KV)?,
        ))
    }

    fn router(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (x, w) = (v.floats(rows * H), v.floats(EXPERTS * H));
        let (h4, experts, top_k) = (H4 as u32, EXPERTS as u32, 3);
        let p = params::Router { rows: rows as u32, h4, experts, top_k, renormalise: 1 };
        let (mut chosen, mut weights) = (vec![0u32; rows * 3], vec![0.0; rows * 3]);
        reference::router(&p, &x, &w, &mut chosen, &mut weights);
        let (ids, out) = (self.up(&vec![0u32; rows * 3])?, self.up(&vec![0f32; rows * 3])?);
        let buffers = [&self.up(&x)?, &self.up(&w)?, &ids, &out];
        let groups = [rows as u32, 1, 1];
        let got = self.run::<_, f32>(Kernel::Router, Variant::default(), &p, &buffers, groups, rows * 3)?;
        Ok(error(&weights, &got).max(self.differs(&ids, &chosen)?))
    }

    fn expert_permute(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
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
    fn differs(&self, buffer: &Buffer, expected: &[u32]) -> Result<f64, EngineError> {
        let mut r = Recording::new(&self.gpu);
        r.read::<u32>(buffer, 0, expected.len());
        let got: Vec<u32> =
            r.submit()?.fetch()?.pop().map(|b| bytemuck::pod_collect_to_vec(&b)).unwrap_or_default();
        Ok(if got == expected { 0.0 } else { 1.0 })
    }

    /// Pairs of `rows` rows over the experts, sorted and cut, with reversed slots.
    fn lists(&self, variant: Variant, rows: usize, v: &mut Values) -> (Vec<Pair>, Vec<Tile>) {
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

    fn expert_up(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (pairs, tiles) = self.lists(variant, rows, v);
        let (x, w1, b1) = (v.floats(rows * H), v.floats(EXPERTS * N * H), v.floats(EXPERTS * N));
        let p = params::ExpertUp { h4: H4 as u32, i4: N4 as u32, first_tile: 0 };
        let mut expected = vec![0.0; rows * N];
        reference::expert_up(&p, &pairs, &tiles, &x, &w1, &b1, &mut expected);
        let out = self.up(&vec![0f32; rows * N])?;
        let lists = (self.up(&pairs)?, self.up(&tiles)?);
        let buffers = [&lists.0, &lists.1, &self.up(&x)?, &self.up(&w1)?, &self.up(&b1)?, &out];
        let groups = [self.columns(N4), tiles.len() as u32, 1];
        Ok(error(&expected, &self.run(Kernel::ExpertUp, variant, &p, &buffers, groups, rows * N)?))
    }

    fn expert_down(&self, variant: Variant, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (pairs, tiles) = self.lists(variant, rows, v);
        let (a, w2, b2) = (v.floats(rows * N), v.floats(EXPERTS * H * N), v.floats(EXPERTS * H));
        let p = params::ExpertDown { i4: N4 as u32, h4: H4 as u32, first_tile: 0 };
        let mut expected = vec![0.0; rows * H];
        reference::expert_down(&p, &pairs, &tiles, &a, &w2, &b2, &mut expected);
        let out = self.up(&vec![0f32; rows * H])?;
        let lists = (self.up(&pairs)?, self.up(&tiles)?);
        let buffers = [&lists.0, &lists.1, &self.up(&a)?, &self.up(&w2)?, &self.up(&b2)?, &out];
        let groups = [self.columns(H4), tiles.len() as u32, 1];
        Ok(error(&expected, &self.run(Kernel::ExpertDown, variant, &p, &buffers, groups, rows * H)?))
    }

    fn combine(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
        let (x, partials) = (v.floats(rows * H), v.floats(2 * rows * H));
        let (source, mut slots) = (v.below(rows, rows), v.below(2 * rows, 2 * rows));
        slots[0] = NO_SLOT;
        let p = params::Combine { rows: rows as u32, h4: H4 as u32, top_k: 2 };
        let mut expected = vec![0.0; rows * H];
        reference::combine(&p, &x, &source, &slots, &partials, &mut expected);
        let out = self.up(&vec![0f32; rows * H])?;
        let buffers = [&self.up(&x)?, &self.up(&source)?, &self.up(&slots)?, &self.up(&partials)?, &out];
        let groups = [self.columns(H4), rows as u32, 1];
        Ok(error(&expected, &self.run(Kernel::Combine, Variant::default(), &p, &buffers, groups, rows * H)?))
    }

    fn argmax(&self, rows: usize, v: &mut Values) -> Result<f64, EngineError> {
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
}

fn tiles_zero(rows: usize) -> Vec<Tile> {
    vec![Tile::default(); rows * 2]
}

/// The largest difference relative to the largest expected value; infinite where a value is no number.
fn error(expected: &[f32], got: &[f32]) -> f64 {
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = expected.iter().zip(got).map(|(e, g)| f64::from((e - g).abs() / largest));
    let worst = worst.fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
    if expected.len() == got.len() { worst } else { f64::INFINITY }
}

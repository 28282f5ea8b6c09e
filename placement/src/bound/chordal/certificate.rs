//! What the present multipliers prove.

use super::Chordal;
use super::block::Block;
use crate::assign::{Assigner, Bounds};
use crate::bound::polyhedron::Rows;

/// A layer's slopes in <W - ρU, M>.
struct Slopes {
    /// `[E, E]` of the layer's own square.
    inside: Vec<f64>,
    /// `[E, border]` of its labels, both triangles.
    labels: Vec<f64>,
}

impl Chordal {
    /// A lower bound on the weight parted.
    pub(super) fn certificate(&self) -> f64 {
        let slopes = self.slopes();
        let across: Vec<Vec<f64>> = self.blocks.iter().map(|block| self.across(block)).collect();
        let spectral: f64 = self.blocks.iter().map(|block| self.spectral_part(block)).sum();
        let kept = match (&self.level.exact, self.shape.border) {
            (Some(sizes), 1..) => self.by_class(sizes, &slopes, &across),
            _ => self.by_rows(&slopes, &across),
        };
        // Rounding of sums and eigenvalues: far below, and on the safe side.
        self.total - kept - spectral - 1e-9 * self.total
    }

    fn slopes(&self) -> Vec<Slopes> {
        let (e, k, n, rho) = (self.shape.experts, self.shape.border, self.shape.side(), self.rho);
        let own = |layer: usize| {
            let mut inside = self.inner[layer].clone();
            inside.resize(e * e, 0.0);
            Slopes { inside, labels: vec![0.0; e * k] }
        };
        let mut slopes: Vec<Slopes> = (0..self.inner.len()).map(own).collect();
        for block in &self.blocks {
            for (layer, offset) in [(block.a, 0), (block.b, e)] {
                let Slopes { inside, labels } = &mut slopes[layer];
                for i in 0..e {
                    let row = &block.u[(offset + i) * n..][..n];
                    let own = inside[i * e..][..e].iter_mut().zip(&row[offset..]);
                    own.for_each(|(slope, u)| *slope -= rho * u);
                    let bordering = labels[i * k..][..k].iter_mut().zip(&row[2 * e..]);
                    bordering.for_each(|(slope, u)| *slope -= 2.0 * rho * u);
                }
            }
        }
        slopes
    }

    /// `[E, E]` slopes of what lies across, both triangles.
    fn across(&self, block: &Block) -> Vec<f64> {
        let (e, n) = (self.shape.experts, self.shape.side());
        let slope = |at: usize| block.weight[at] - 2.0 * self.rho * block.u[at / e * n + e + at % e];
        (0..e * e).map(slope).collect()
    }

    /// <ρU, J/k> and the eigenvalues' part; of a border also its corner, which is fixed.
    fn spectral_part(&self, block: &Block) -> f64 {
        let (e, n, k) = (self.shape.experts, self.shape.side(), self.level.sizes.len());
        let mean: f64 = block.u.iter().sum::<f64>() / k as f64;
        let corner: f64 = (2 * e..n).map(|at| block.u[at * (n + 1)]).sum();
        let above: f64 = block.excess.iter().zip(self.caps()).map(|(over, cap)| over * cap).sum();
        self.rho * (mean - corner + above)
    }

    /// Every row for itself.
    fn by_rows(&self, slopes: &[Slopes], across: &[Vec<f64>]) -> f64 {
        let e = self.shape.experts;
        let (between, within) = (Rows::across(&self.level, e), Rows::within(&self.level, e));
        let counted = slopes.iter().zip(&self.shared).filter(|(_, shared)| **shared > 0);
        across.iter().map(|slopes| between.most(slopes)).sum::<f64>()
            + counted.map(|(slopes, _)| within.most(&slopes.inside)).sum::<f64>()
    }

    /// An expert of class g has its label, m_g - 1 others of its layer and m_g of the next (or of the last) layer: the
    /// best classes of a layer's experts are an assignment problem. Over next or last layers, whichever proves more.
    fn by_class(&self, sizes: &[usize], slopes: &[Slopes], across: &[Vec<f64>]) -> f64 {
        let e = self.shape.experts;
        let transposed: Vec<Vec<f64>> =
            across.iter().map(|cells| (0..e * e).map(|at| cells[at % e * e + at / e]).collect()).collect();
        let sum = |begins: &dyn Fn(&Block) -> usize, cells: &[Vec<f64>]| -> f64 {
            let layer_sum = |(layer, slopes): (usize, &Slopes)| {
                let blocks = self.blocks.iter().zip(cells).filter(|(block, _)| begins(block) == layer);
                self.best_classes(sizes, slopes, &blocks.map(|(_, cells)| &cells[..]).collect::<Vec<_>>())
            };
            let counted = slopes.iter().enumerate().filter(|(layer, _)| self.shared[*layer] > 0);
            counted.map(layer_sum).sum()
        };
        sum(&|block| block.a, across).min(sum(&|block| block.b, &transposed))
    }

    fn best_classes(&self, sizes: &[usize], slopes: &Slopes, across: &[&[f64]]) -> f64 {
        let (e, k) = (self.shape.experts, self.shape.border);
        let mut value = vec![0.0; k * e];
        for i in 0..e {
            let mut others = slopes.inside[i * e..][..e].to_vec();
            let own = others.swap_remove(i);
            let others = falling_sums(others);
            let beyond: Vec<Vec<f64>> =
                across.iter().map(|cells| falling_sums(cells[i * e..][..e].to_vec())).collect();
            for (g, &size) in sizes.iter().enumerate() {
                let far: f64 = beyond.iter().map(|sums| sums[size]).sum();
                // A class without a place for anybody is nobody's.
                let near = size.checked_sub(1).map_or(0.0, |others_of| others[others_of]);
                value[g * e + i] = slopes.labels[i * k + g] + own + near + far;
            }
        }
        let cost: Vec<f64> = value.iter().map(|value| -value).collect();
        let mut classes: Vec<u16> =
            sizes.iter().enumerate().flat_map(|(g, &n)| std::iter::repeat_n(g as u16, n)).collect();
        let scale = cost.iter().fold(0.0f64, |most, cost| most.max(cost.abs()));
        let bounds = Bounds { least: sizes, most: sizes };
        // What cycles below the threshold could still gain is added.
        let epsilon = 1e-12 * scale;
        Assigner::new(k).solve(&cost, &mut classes, bounds, epsilon, &mut Vec::new());
        let found: f64 = classes.iter().enumerate().map(|(i, &g)| value[g as usize * e + i]).sum();
        found + epsilon * (e * (k + 1)) as f64
    }
}

/// Sums of the largest 0, 1, 2, … values.
fn falling_sums(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0;
    std::iter::once(0.0)
        .chain(values.into_iter().map(|value| {
            sum += value;
            sum
        }))
        .collect()
}

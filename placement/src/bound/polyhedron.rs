//! Linear bounds over the polyhedron: the most that entries of a square of Y can collect.

use crate::bound::levels::Level;

/// How many entries of each row of an E x E square may be 1.
pub(crate) struct Rows {
    experts: usize,
    /// Entries of a row at most (where `exact`: exactly), the diagonal of a layer's own square not counted.
    each: usize,
    /// Entries in all at most.
    all: usize,
    exact: bool,
    /// Whether the diagonal is 1.
    own: bool,
}

impl Rows {
    /// Squares between two layers: row i sums to the size of i's class.
    pub(crate) fn across(level: &Level, experts: usize) -> Self {
        let fullest = level.fullest(experts);
        let all = fullest.iter().map(|n| n * n).sum();
        Self { experts, each: level.sizes[0], all, exact: level.equal, own: false }
    }

    /// A layer's own square: the same, one entry of each row is the diagonal.
    pub(crate) fn within(level: &Level, experts: usize) -> Self {
        let across = Self::across(level, experts);
        Self { each: across.each - 1, all: across.all - experts, own: true, ..across }
    }

    /// An upper bound on Σ slope · Y over all such squares Y.
    pub(crate) fn most(&self, slope: &[f64]) -> f64 {
        let e = self.experts;
        let rows = self.by_rows(slope);
        if self.own {
            return rows + (0..e).map(|i| slope[i * (e + 1)]).sum::<f64>();
        }
        let transposed: Vec<f64> = (0..e * e).map(|at| slope[at % e * e + at / e]).collect();
        rows.min(self.by_rows(&transposed))
    }

    fn by_rows(&self, slope: &[f64]) -> f64 {
        let mut taken: Vec<f64> = Vec::new();
        let mut sum = 0.0;
        for (i, row) in slope.chunks_exact(self.experts).enumerate() {
            let mut row = row.to_vec();
            if self.own {
                row.swap_remove(i);
            }
            let each = self.each.min(row.len());
            if each > 0 && each < row.len() {
                row.select_nth_unstable_by(each - 1, |a, b| b.total_cmp(a));
            }
            if self.exact {
                sum += row[..each].iter().sum::<f64>();
            } else {
                taken.extend(row[..each].iter().filter(|&&slope| slope > 0.0));
            }
        }
        if taken.len() > self.all {
            taken.sort_by(|a, b| b.total_cmp(a));
            taken.truncate(self.all);
        }
        sum + taken.iter().sum::<f64>()
    }
}

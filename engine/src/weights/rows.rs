//! A matrix on its way from disk to the padded form that the kernels read.

/// Rows of `columns` values.
#[derive(Clone)]
pub(super) struct Rows {
    pub(super) values: Vec<f32>,
    pub(super) columns: usize,
}

impl Rows {
    /// Pads every row with zeros to `columns`.
    pub(super) fn widen(self, columns: usize) -> Self {
        if columns == self.columns {
            return self;
        }
        let mut values = vec![0.0; self.values.len() / self.columns * columns];
        for (to, from) in values.chunks_exact_mut(columns).zip(self.values.chunks_exact(self.columns)) {
            to[..self.columns].copy_from_slice(from);
        }
        Self { values, columns }
    }

    /// Pads every group of `group` rows with rows of zeros to `padded`.
    pub(super) fn lengthen(self, group: usize, padded: usize) -> Self {
        let (from, to) = (group * self.columns, padded * self.columns);
        Self { values: Rows { values: self.values, columns: from }.widen(to).values, columns: self.columns }
    }

    /// Pads rows and their number to whole vec4s.
    pub(super) fn padded(self) -> Self {
        let (columns, rows) = (self.columns, self.count());
        self.widen(columns.next_multiple_of(4)).lengthen(rows, rows.next_multiple_of(4))
    }

    /// The same values as rows of another length.
    pub(super) fn cut(self, columns: usize) -> Self {
        Self { values: self.values, columns }
    }

    pub(super) fn count(&self) -> usize {
        self.values.len() / self.columns
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    /// The rows that `order` names.
    pub(super) fn take(&self, order: impl IntoIterator<Item = usize>) -> Self {
        let values = order.into_iter().flat_map(|row| self.row(row).iter().copied()).collect();
        Self { values, columns: self.columns }
    }

    pub(super) fn transposed(&self) -> Self {
        let rows = self.count();
        let value = |i: usize| self.values[i % rows * self.columns + i / rows];
        Self { values: (0..self.values.len()).map(value).collect(), columns: rows }
    }

    /// These rows, then those of `below`.
    pub(super) fn above(mut self, below: Self) -> Self {
        self.values.extend(below.values);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::Rows;

    #[test]
    fn rows_and_groups_are_padded_with_zeros() {
        let rows = Rows { values: vec![1., 2., 3., 4., 5., 6.], columns: 3 };
        let padded = rows.clone().widen(4).lengthen(1, 2);
        let expected = [1., 2., 3., 0., 0., 0., 0., 0., 4., 5., 6., 0., 0., 0., 0., 0.];
        assert_eq!(padded.values, expected);
        assert_eq!(rows.transposed().values, [1., 4., 2., 5., 3., 6.]);
        assert_eq!(rows.take([1, 0]).values, [4., 5., 6., 1., 2., 3.]);
    }
}

//! Lists of (token, expert) pairs for one launch of this rank's experts.

use crate::gpu::Cut;
use crate::model::decoder::ExpertBatch;
use exflow_shaders::params::{Pair, Tile};

/// Pairs sorted by local expert and cut into tiles, ready for upload behind those of earlier batches.
#[derive(Debug, Default)]
pub(crate) struct PairList {
    pub(crate) pairs: Vec<Pair>,
    pub(crate) tiles: Vec<Tile>,
    pub(crate) batch: Option<ExpertBatch>,
}

impl PairList {
    /// Sorts `pairs` by expert (the order within an expert stays) and cuts them as `cut` says; the lists will
    /// lie behind so many (pairs, tiles).
    pub(crate) fn new(
        mut pairs: Vec<Pair>,
        (pairs_before, tiles_before): (usize, usize),
        cut: Cut<'_>,
    ) -> Self {
        pairs.sort_by_key(|pair| pair.expert);
        let distinct = pairs.chunk_by(|a, b| a.expert == b.expert).count();
        let variant = cut.shared_by(pairs.len(), distinct);
        let mut tiles = Vec::new();
        let mut first = 0;
        for group in pairs.chunk_by(|a, b| a.expert == b.expert) {
            for part in group.chunks(variant.tile_rows()) {
                let at = (pairs_before + first) as u32;
                tiles.push(Tile { expert: part[0].expert, first: at, count: part.len() as u32, pad: 0 });
                first += part.len();
            }
        }
        let batch = (!tiles.is_empty()).then_some(ExpertBatch {
            first_pair: pairs_before,
            pairs: pairs.len(),
            first_tile: tiles_before,
            tiles: tiles.len(),
            variant,
        });
        Self { pairs, tiles, batch }
    }

    /// Rows `rows` through one FFN that every token takes; their partials start at `first_slot`.
    pub(crate) fn every(rows: &[u32], first_slot: u32, before: (usize, usize), cut: Cut<'_>) -> Self {
        let pair =
            |(i, &row): (usize, &u32)| Pair { row, slot: first_slot + i as u32, weight: 1.0, expert: 0 };
        Self::new(rows.iter().enumerate().map(pair).collect(), before, cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Form;
    use exflow_shaders::Weights;

    #[test]
    fn every_pair_is_in_one_tile_of_its_expert() {
        let experts = [3, 1, 3, 3, 1, 3, 3, 3, 3, 3, 3, 3, 3];
        let pairs = experts.iter().enumerate();
        let pairs = pairs.map(|(i, &expert)| Pair { row: i as u32, slot: i as u32, weight: 1.0, expert });
        let list = PairList::new(pairs.collect(), (10, 5), Cut::rules(Form::new(Weights::F32, false), true));
        assert_eq!(list.batch.expect("not empty").first_tile, 5);
        let mut seen = 0;
        for tile in &list.tiles {
            for at in tile.first..tile.first + tile.count {
                assert_eq!(list.pairs[at as usize - 10].expert, tile.expert);
                seen += 1;
            }
        }
        assert_eq!(seen, experts.len());
    }
}

//! A matrix of costs seen as a sum of partitions: D[g][h] >= Σ_levels weight · [g and h in different classes].
//!
//! The classes at a height are the ranks joined by links cheaper than it (single linkage); the sum is the
//! largest ultrametric below D, and equals D where D is one: equal links, or hosts with equal links inside.

use crate::cost::Problem;

/// More levels than this are not worth their time; leaving one out keeps the bound sound.
const MOST_LEVELS: usize = 4;

/// A partition of the ranks into classes, and what parting costs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Level {
    /// Cost of sitting in different classes.
    pub(crate) weight: f64,
    /// Most experts of a layer in each class, falling.
    pub(crate) sizes: Vec<usize>,
    /// Whether every class holds exactly so many of each layer, all equally many.
    pub(crate) equal: bool,
    /// `[k]` experts of each layer in every class, by class, where that is known exactly.
    pub(crate) exact: Option<Vec<usize>>,
    /// `[R]`: each rank's class.
    pub(crate) class: Vec<usize>,
}

/// The levels of a problem, from near to far.
pub(crate) fn levels(problem: &Problem) -> Vec<Level> {
    let r = problem.ranks;
    let cost = |g: usize, h: usize| problem.dist[g * r + h].min(problem.dist[h * r + g]);
    let mut heights: Vec<f64> =
        (0..r * r).map(|at| cost(at / r, at % r)).filter(|&c| c > 0.0 && c.is_finite()).collect();
    heights.sort_by(f64::total_cmp);
    heights.dedup();
    let mut levels = Vec::new();
    let mut below = 0.0;
    for height in heights {
        let class = components(r, |g, h| cost(g, h) < height);
        if class.iter().all(|&c| c == 0) {
            break;
        }
        let same = levels.last_mut().filter(|last: &&mut Level| last.class == class);
        match same {
            Some(last) => last.weight += height - below,
            None => levels.push(Level::new(problem, height - below, class)),
        }
        below = height;
    }
    while levels.len() > MOST_LEVELS {
        let least =
            (0..levels.len()).min_by(|&a, &b| levels[a].weight.total_cmp(&levels[b].weight)).unwrap_or(0);
        levels.remove(least);
    }
    levels
}

impl Level {
    fn new(problem: &Problem, weight: f64, class: Vec<usize>) -> Self {
        let count = class.iter().max().map_or(0, |most| most + 1);
        let (mut sizes, mut least) = (vec![0usize; count], vec![0usize; count]);
        for (rank, &c) in class.iter().enumerate() {
            sizes[c] = (sizes[c] + problem.capacity.most[rank]).min(problem.experts);
            least[c] += problem.capacity.least[rank];
        }
        let full: usize = sizes.iter().sum();
        let exact = (sizes == least || full == problem.experts).then(|| sizes.clone());
        let equal = exact.is_some() && sizes.iter().all(|&n| n == sizes[0]);
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        Self { weight, sizes, equal, exact, class }
    }

    /// The largest sizes that classes can have together: Σ = E, filled from the largest.
    pub(crate) fn fullest(&self, experts: usize) -> Vec<usize> {
        let mut left = experts;
        self.sizes
            .iter()
            .map(|&size| {
                let held = size.min(left);
                left -= held;
                held
            })
            .collect()
    }
}

/// Connected components, numbered in the order of their first rank.
fn components(ranks: usize, joined: impl Fn(usize, usize) -> bool) -> Vec<usize> {
    let mut class = vec![usize::MAX; ranks];
    let mut count = 0;
    for start in 0..ranks {
        if class[start] != usize::MAX {
            continue;
        }
        let mut open = vec![start];
        while let Some(g) = open.pop() {
            class[g] = count;
            open.extend((0..ranks).filter(|&h| class[h] == usize::MAX && h != g && joined(g, h)));
        }
        count += 1;
    }
    class
}

//! Two ranks, all other holders fixed: their experts of a whole run of layers are split anew, exactly, by
//! Viterbi's algorithm over the ways to split each layer.
//!
//! The m experts that ranks g and h hold of a layer can be split in C(m, n) ways; where that is few all are
//! states, else the present split, its single exchanges and the full exchange are: each layer's choice is
//! then small, but all layers choose at once. Most runs are quick ones, which go on from the cheapest states alone.

use crate::assign::Shift;
use crate::cost::Edge;
use crate::solve::state::State;

/// Most states of a layer; the run over L layers takes O(L · states²).
const STATES: usize = 272;
/// Up to this many experts all splits are tried (m = 10 has 252).
const ALL_SPLITS: usize = 10;
/// Splits of a layer from which a quick run goes on, beside the present one: the cheapest so far.
const BEAM: usize = 12;

/// How thoroughly a run is searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// On from the cheapest few splits of each layer.
    Quick,
    /// Viterbi's algorithm: the cheapest run there is.
    Exact,
}

/// The experts that two ranks hold of one layer, and the splits to choose from.
struct Stage {
    layer: usize,
    /// Experts on g or h now.
    experts: Vec<u16>,
    /// Bit x: `experts[x]` is on g. The present split comes first.
    splits: Vec<u64>,
    /// Cost of each split against everything that is fixed.
    own: Vec<f64>,
}

/// Re-splits the experts of ranks `g` and `h` in `length` layers from `first` on (around the ring). Returns whether the cost fell by more than `epsilon`.
pub(crate) fn resplit(
    state: &mut State<'_>,
    [g, h]: [usize; 2],
    (first, length): (usize, usize),
    effort: Effort,
    epsilon: f64,
) -> bool {
    let problem = state.problem;
    let layers = problem.layers;
    let window: Vec<usize> = (0..length.min(layers)).map(|t| (first + t) % layers).collect();
    let mut stages: Vec<Stage> = window.iter().map(|&layer| Stage::new(state, layer, [g, h])).collect();
    if stages.iter().any(|stage| stage.splits.is_empty()) {
        return false;
    }
    for t in 0..stages.len() {
        let own =
            stages[t].fixed_cost(state, [g, h], t.checked_sub(1).map(|p| &stages[p]), stages.get(t + 1));
        stages[t].own = own;
    }
    let Some(choice) = cheapest_run(state, &stages, [g, h], effort, epsilon) else { return false };
    for (stage, &split) in stages.iter().zip(&choice) {
        stage.apply(state, [g, h], stage.splits[split]);
    }
    true
}

impl Stage {
    fn new(state: &State<'_>, layer: usize, [g, h]: [usize; 2]) -> Self {
        let row = state.layer(layer);
        let on = |x: &usize| row[*x] as usize == g || row[*x] as usize == h;
        let mut experts: Vec<u16> = (0..row.len()).filter(on).map(|x| x as u16).collect();
        let one_side = |rank: usize| experts.iter().all(|&x| row[x as usize] as usize == rank);
        if state.problem.capacity.total.is_some() && (one_side(g) || one_side(h)) {
            // Numbers are kept (see `splits`), so that such a layer has nothing to choose.
            experts.clear();
        }
        let splits = if experts.len() <= 64 { splits(state, &experts, row, [g, h]) } else { Vec::new() };
        Self { layer, experts, splits, own: Vec::new() }
    }

    /// Cost of each split, apart from pairs with the stages before and after.
    fn fixed_cost(
        &self,
        state: &State<'_>,
        [g, h]: [usize; 2],
        before: Option<&Self>,
        after: Option<&Self>,
    ) -> Vec<f64> {
        let e = state.problem.experts;
        let table = state.table(self.layer);
        let mut on_g: Vec<f64> = self.experts.iter().map(|&x| table[g * e + x as usize]).collect();
        let mut on_h: Vec<f64> = self.experts.iter().map(|&x| table[h * e + x as usize]).collect();
        for other in before.into_iter().chain(after) {
            self.without(state, other, [g, h], &mut on_g, &mut on_h);
        }
        let base: f64 = on_h.iter().sum();
        let gain: Vec<f64> = on_g.iter().zip(&on_h).map(|(a, b)| a - b).collect();
        let mut own = subset_sums(&self.splits, &gain);
        own.iter_mut().for_each(|cost| *cost += base);
        if state.problem.self_coupled(self.layer) {
            own.iter_mut()
                .zip(&self.splits)
                .for_each(|(cost, &split)| *cost += self.inner_cost(state, [g, h], split));
        }
        own
    }

    /// Takes what `other`'s experts cost out of the marginal costs.
    fn without(
        &self,
        state: &State<'_>,
        other: &Self,
        [g, h]: [usize; 2],
        on_g: &mut [f64],
        on_h: &mut [f64],
    ) {
        let (r, dist) = (state.problem.ranks, &state.problem.dist);
        let row = state.layer(other.layer);
        for (edge, leaves) in edges_between(state, self.layer, other.layer) {
            for (a, &x) in self.experts.iter().enumerate() {
                for &y in &other.experts {
                    let k = row[y as usize] as usize;
                    let count = count(edge, leaves, state.problem.experts, x, y);
                    let price = |rank: usize| if leaves { dist[rank * r + k] } else { dist[k * r + rank] };
                    on_g[a] -= count * price(g);
                    on_h[a] -= count * price(h);
                }
            }
        }
    }

    /// Correction for pairs inside the layer: the marginal costs count them against the present split.
    fn inner_cost(&self, state: &State<'_>, [g, h]: [usize; 2], split: u64) -> f64 {
        let (r, dist) = (state.problem.ranks, &state.problem.dist);
        let price = |a: bool, b: bool| match (a, b) {
            (true, false) => dist[g * r + h],
            (false, true) => dist[h * r + g],
            _ => 0.0,
        };
        let now = self.splits[0];
        let side = |split: u64, x: usize| split >> x & 1 == 1;
        let mut sum = 0.0;
        for (edge, _) in edges_between(state, self.layer, self.layer) {
            for (a, &x) in self.experts.iter().enumerate() {
                for (b, &y) in self.experts.iter().enumerate() {
                    let w = edge.weight[x as usize * state.problem.experts + y as usize];
                    let counted = price(side(split, a), side(now, b)) + price(side(now, a), side(split, b));
                    sum += w * (price(side(split, a), side(split, b)) - counted);
                }
            }
        }
        sum
    }

    fn apply(&self, state: &mut State<'_>, [g, h]: [usize; 2], split: u64) {
        for (x, &expert) in self.experts.iter().enumerate() {
            let to = if split >> x & 1 == 1 { g } else { h };
            state.shift(self.layer, Shift { expert, to: to as u16 });
        }
    }
}

/// The edges between two layers, and whether each leaves `layer`.
fn edges_between<'s>(state: &State<'s>, layer: usize, other: usize) -> Vec<(&'s Edge, bool)> {
    let problem = state.problem;
    let leaving = problem.leaving[layer].iter().map(|&at| &problem.edges[at]).filter(|edge| edge.to == other);
    let entering =
        problem.entering[layer].iter().map(|&at| &problem.edges[at]).filter(|edge| edge.from == other);
    let entering = entering.filter(|_| layer != other);
    leaving.map(|edge| (edge, true)).chain(entering.map(|edge| (edge, false))).collect()
}

fn count(edge: &Edge, leaves: bool, experts: usize, x: u16, y: u16) -> f64 {
    let rows = if leaves { &edge.weight } else { &edge.transposed };
    rows[x as usize * experts + y as usize]
}

/// The present split, then others within both ranks' bounds.
fn splits(state: &State<'_>, experts: &[u16], row: &[u16], [g, h]: [usize; 2]) -> Vec<u64> {
    let now = experts
        .iter()
        .enumerate()
        .fold(0, |bits, (x, &e)| bits | u64::from(row[e as usize] as usize == g) << x);
    let (capacity, m) = (&state.problem.capacity, experts.len());
    let least = capacity.least[g].max(m.saturating_sub(capacity.most[h]));
    let most = capacity.most[g].min(m - capacity.least[h].min(m));
    // Where only a rank's total is bounded, each layer keeps its numbers: layers then cannot add up to too many.
    let fixed = capacity.total.is_some().then_some(now.count_ones());
    let fits = |split: u64| {
        let on_g = split.count_ones();
        fixed.map_or((least..=most).contains(&(on_g as usize)), |fixed| fixed == on_g)
    };
    let mut all = vec![now];
    if m <= ALL_SPLITS {
        all.extend((0..1u64 << m).filter(|&split| split != now && fits(split)));
    } else {
        let bits = |on: bool| (0..m).filter(move |x| (now >> x & 1 == 1) == on);
        let full = now ^ (u64::MAX >> (64 - m));
        all.extend(Some(full).filter(|&split| fits(split)));
        all.extend(bits(true).flat_map(|x| bits(false).map(move |y| now ^ 1 << x ^ 1 << y)));
        all.extend((0..m).map(|x| now ^ 1 << x).filter(|&split| fits(split)));
    }
    if all.len() > STATES { Vec::new() } else { all }
}

/// Sum of `values` over the bits of every set, by halves: two look-ups each where sets are narrow.
fn subset_sums(sets: &[u64], values: &[f64]) -> Vec<f64> {
    if values.len() <= 12 {
        let half = values.len() / 2;
        let (low, high) = (all_subset_sums(&values[..half]), all_subset_sums(&values[half..]));
        let mask = (1u64 << half) - 1;
        return sets.iter().map(|set| low[(set & mask) as usize] + high[(set >> half) as usize]).collect();
    }
    let base: f64 = (0..values.len()).filter(|x| sets[0] >> x & 1 == 1).map(|x| values[x]).sum();
    let differing = |set: u64| {
        let (mut bits, mut sum) = (set ^ sets[0], base);
        while bits != 0 {
            let x = bits.trailing_zeros() as usize;
            sum += if set >> x & 1 == 1 { values[x] } else { -values[x] };
            bits &= bits - 1;
        }
        sum
    };
    sets.iter().map(|&set| differing(set)).collect()
}

fn all_subset_sums(values: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; 1 << values.len()];
    for set in 1..sums.len() {
        sums[set] = sums[set & (set - 1)] + values[set.trailing_zeros() as usize];
    }
    sums
}

/// Viterbi: the split of every stage on the cheapest run, or none where the present one is within epsilon.
fn cheapest_run(
    state: &State<'_>,
    stages: &[Stage],
    pair: [usize; 2],
    effort: Effort,
    epsilon: f64,
) -> Option<Vec<usize>> {
    let mut cost = stages[0].own.clone();
    let mut present = cost[0];
    let mut came_from: Vec<Vec<u16>> = Vec::with_capacity(stages.len());
    let mut sums = SubsetSums::default();
    for t in 1..stages.len() {
        let (before, after) = (&stages[t - 1], &stages[t]);
        let between = Between::new(state, before, after, pair);
        let mut next = vec![f64::INFINITY; after.splits.len()];
        let mut from = vec![0u16; after.splits.len()];
        let dearest = if effort == Effort::Quick { beam(&cost) } else { f64::INFINITY };
        for (s, &split) in before.splits.iter().enumerate() {
            if s > 0 && cost[s] > dearest {
                continue;
            }
            let base = between.slopes(split, &mut sums.values);
            sums.prepare(between.n, after.splits[0]);
            if s == 0 {
                present += base + sums.of(after.splits[0]) + after.own[0];
            }
            let base = cost[s] + base;
            for (&to, (next, from)) in after.splits.iter().zip(next.iter_mut().zip(&mut from)) {
                let sum = base + sums.of(to);
                if sum < *next {
                    (*next, *from) = (sum, s as u16);
                }
            }
        }
        next.iter_mut().zip(&after.own).for_each(|(sum, own)| *sum += own);
        came_from.push(from);
        cost = next;
    }
    let last = (0..cost.len()).min_by(|&a, &b| cost[a].total_cmp(&cost[b]))?;
    (cost[last] < present - epsilon).then(|| trace_back(&came_from, last))
}

/// The most that a split may have cost so far to be gone on from in a quick run.
fn beam(cost: &[f64]) -> f64 {
    if cost.len() <= BEAM {
        return f64::INFINITY;
    }
    let mut falling = cost.to_vec();
    *falling.select_nth_unstable_by(BEAM - 1, f64::total_cmp).1
}

/// Sums of up to 64 values over sets of them, without allocating: by halves where sets are narrow, else by what
/// differs from one set.
struct SubsetSums {
    values: [f64; 64],
    low: [f64; 64],
    high: [f64; 64],
    /// Values in the lower half; 64 where sets are wide.
    half: usize,
    /// A set and its sum, where sets are wide.
    known: (u64, f64),
}

impl Default for SubsetSums {
    fn default() -> Self {
        Self { values: [0.0; 64], low: [0.0; 64], high: [0.0; 64], half: 0, known: (0, 0.0) }
    }
}

impl SubsetSums {
    /// After the first `n` of `values` were set; `near` is a set that the others resemble.
    fn prepare(&mut self, n: usize, near: u64) {
        if n > 12 {
            let sum = (0..n).filter(|x| near >> x & 1 == 1).map(|x| self.values[x]).sum();
            (self.half, self.known) = (64, (near, sum));
            return;
        }
        self.half = n / 2;
        fill_subset_sums(&self.values[..self.half], &mut self.low);
        fill_subset_sums(&self.values[self.half..n], &mut self.high);
    }

    #[inline]
    fn of(&self, set: u64) -> f64 {
        if self.half < 64 {
            let (low, high) = (set & ((1 << self.half) - 1), set >> self.half);
            return self.low[(low & 63) as usize] + self.high[(high & 63) as usize];
        }
        let (mut bits, mut sum) = (set ^ self.known.0, self.known.1);
        while bits != 0 {
            let x = bits.trailing_zeros() as usize;
            sum += if set >> x & 1 == 1 { self.values[x] } else { -self.values[x] };
            bits &= bits - 1;
        }
        sum
    }
}

fn fill_subset_sums(values: &[f64], sums: &mut [f64; 64]) {
    sums[0] = 0.0;
    for (x, value) in values.iter().enumerate() {
        let (known, new) = sums.split_at_mut(1 << x);
        new[..1 << x].iter_mut().zip(known).for_each(|(sum, known)| *sum = *known + value);
    }
}

fn trace_back(came_from: &[Vec<u16>], last: usize) -> Vec<usize> {
    let mut choice = vec![last];
    for from in came_from.iter().rev() {
        choice.push(from[choice[choice.len() - 1]] as usize);
    }
    choice.reverse();
    choice
}

/// Pair costs between two neighbouring stages.
struct Between {
    /// `[m, n]`: cost where x is on g and y on h.
    apart_gh: Vec<f64>,
    /// `[m, n]`: cost where x is on h and y on g.
    apart_hg: Vec<f64>,
    m: usize,
    n: usize,
}

impl Between {
    fn new(state: &State<'_>, before: &Stage, after: &Stage, [g, h]: [usize; 2]) -> Self {
        let (r, e, dist) = (state.problem.ranks, state.problem.experts, &state.problem.dist);
        let (m, n) = (before.experts.len(), after.experts.len());
        let (mut apart_gh, mut apart_hg) = (vec![0.0; m * n], vec![0.0; m * n]);
        for (edge, leaves) in edges_between(state, before.layer, after.layer) {
            let (gh, hg) = (dist[g * r + h], dist[h * r + g]);
            let (gh, hg) = if leaves { (gh, hg) } else { (hg, gh) };
            for (a, &x) in before.experts.iter().enumerate() {
                for (b, &y) in after.experts.iter().enumerate() {
                    let count = count(edge, leaves, e, x, y);
                    apart_gh[a * n + b] += count * gh;
                    apart_hg[a * n + b] += count * hg;
                }
            }
        }
        Self { apart_gh, apart_hg, m, n }
    }

    /// Of going from `split` to a set of the next stage's experts: what the empty set costs, and into `slopes` what each
    /// expert of the set adds.
    fn slopes(&self, split: u64, slopes: &mut [f64; 64]) -> f64 {
        let (mut on_h, n) = ([0.0; 64], self.n);
        slopes[..n].fill(0.0);
        for x in 0..self.m {
            let (sums, rows) = if split >> x & 1 == 1 {
                (&mut on_h, &self.apart_gh)
            } else {
                (&mut *slopes, &self.apart_hg)
            };
            sums[..n].iter_mut().zip(&rows[x * n..][..n]).for_each(|(sum, cost)| *sum += cost);
        }
        slopes[..n].iter_mut().zip(&on_h).for_each(|(g, h)| *g -= h);
        on_h[..n].iter().sum()
    }
}

//! The states of a layer: every way to spread E experts over R ranks within the capacity, and which of them are
//! equal up to a renaming of ranks.

use crate::cost::Problem;

/// More states than this are not listed.
const MOST: usize = 1 << 16;
/// More renamings than this are not listed; then every state stands for itself.
const MOST_RENAMINGS: usize = 5040;

/// Fewer states than this are weighed one by one.
const FEW: usize = 48;

/// All states of a layer, sorted by the holders of the second half of the experts.
pub(crate) struct States {
    experts: usize,
    ranks: usize,
    /// `[S, E]` holders.
    holders: Vec<u8>,
    /// `[S]` holders of the first half, as one number to base R.
    low: Vec<u32>,
    /// `[S]` holders of the second half, likewise.
    high: Vec<u32>,
    /// Runs of states with the same second half: (that half as a number to base R, first state, one past the last).
    runs: Vec<(u32, usize, usize)>,
    /// `[S]` the orbit of each state.
    orbit: Vec<u32>,
    /// A state of each orbit.
    representatives: Vec<usize>,
}

impl States {
    /// Lists the states; none where there are too many.
    pub(crate) fn new(problem: &Problem) -> Option<Self> {
        let (experts, ranks) = (problem.experts, problem.ranks);
        let (first, second) = (experts / 2, experts - experts / 2);
        let table = |digits: usize| u32::try_from(digits).ok().and_then(|n| ranks.checked_pow(n));
        if ranks > 255 || table(first)? > MOST || table(second)? > MOST {
            return None;
        }
        let mut list = Lister { problem, row: vec![0; experts], counts: vec![0; ranks], found: Vec::new() };
        if !list.fill(experts) {
            return None;
        }
        let holders = list.found;
        let number = |row: &[u8]| row.iter().rev().fold(0u32, |sum, &g| sum * ranks as u32 + u32::from(g));
        let low = holders.chunks_exact(experts).map(|row| number(&row[..first])).collect();
        let high: Vec<u32> = holders.chunks_exact(experts).map(|row| number(&row[first..])).collect();
        let mut runs: Vec<(u32, usize, usize)> = Vec::new();
        for (state, &high) in high.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.0 == high => run.2 = state + 1,
                _ => runs.push((high, state, state + 1)),
            }
        }
        let mut states =
            Self { experts, ranks, holders, low, high, runs, orbit: Vec::new(), representatives: Vec::new() };
        states.find_orbits(problem);
        Some(states)
    }

    /// S.
    pub(crate) fn len(&self) -> usize {
        self.low.len()
    }

    /// Number of orbits.
    pub(crate) fn orbits(&self) -> usize {
        self.representatives.len()
    }

    /// The orbit of a state.
    pub(crate) fn orbit(&self, state: usize) -> usize {
        self.orbit[state] as usize
    }

    /// A state of an orbit.
    pub(crate) fn representative(&self, orbit: usize) -> usize {
        self.representatives[orbit]
    }

    /// `[E]` holders of a state.
    pub(crate) fn row(&self, state: usize) -> &[u8] {
        &self.holders[state * self.experts..][..self.experts]
    }

    /// Hands every state and its cost under `table` `[R, E]` (expert e on rank r) to `take`: two look-ups each.
    pub(crate) fn weigh(&self, table: &[f64], mut take: impl FnMut(usize, f64)) {
        let first = self.experts / 2;
        let low = half_sums(table, self.experts, 0..first, self.ranks);
        let high = half_sums(table, self.experts, first..self.experts, self.ranks);
        for &(run, from, to) in &self.runs {
            let base = high[run as usize];
            for (state, &at) in (from..to).zip(&self.low[from..to]) {
                take(state, base + low[at as usize]);
            }
        }
    }

    /// The same for some states alone.
    pub(crate) fn weigh_some(&self, table: &[f64], some: &[u32], mut take: impl FnMut(usize, f64)) {
        let first = self.experts / 2;
        let some = some.iter().map(|&state| state as usize);
        if some.len() < FEW {
            for state in some {
                let price = |(e, &g): (usize, &u8)| table[usize::from(g) * self.experts + e];
                take(state, self.row(state).iter().enumerate().map(price).sum());
            }
            return;
        }
        let low = half_sums(table, self.experts, 0..first, self.ranks);
        let high = half_sums(table, self.experts, first..self.experts, self.ranks);
        for state in some {
            take(state, high[self.high[state] as usize] + low[self.low[state] as usize]);
        }
    }

    fn find_orbits(&mut self, problem: &Problem) {
        let renamings = renamings(problem);
        let code = |row: &mut dyn Iterator<Item = u8>| {
            row.fold(0u128, |sum, g| sum.wrapping_mul(self.ranks as u128).wrapping_add(u128::from(g)))
        };
        let mut known = std::collections::HashMap::new();
        for state in 0..self.len() {
            let row = self.row(state);
            let name = |names: &Vec<u8>| code(&mut row.iter().map(|&g| names[usize::from(g)]));
            let least = renamings.iter().map(name).min().unwrap_or(0);
            let next = known.len() as u32;
            let orbit = *known.entry(least).or_insert(next);
            if orbit == next {
                self.representatives.push(state);
            }
            self.orbit.push(orbit);
        }
    }
}

/// Sums of `table` over every choice of a rank for each of `experts`, numbered to base R.
fn half_sums(table: &[f64], e: usize, experts: std::ops::Range<usize>, ranks: usize) -> Vec<f64> {
    let mut sums = Vec::with_capacity(ranks.pow(experts.len() as u32));
    sums.push(0.0);
    for expert in experts {
        let known = sums.len();
        for rank in 1..ranks {
            let cost = table[rank * e + expert];
            sums.extend_from_within(..known);
            sums[rank * known..].iter_mut().for_each(|sum| *sum += cost);
        }
        sums[..known].iter_mut().for_each(|sum| *sum += table[expert]);
    }
    sums
}

/// Lists rows from the last expert down, so that states with one second half come together.
struct Lister<'p> {
    problem: &'p Problem,
    row: Vec<u8>,
    counts: Vec<usize>,
    found: Vec<u8>,
}

impl Lister<'_> {
    /// Whether all rows were listed.
    fn fill(&mut self, left: usize) -> bool {
        let (least, most) = (&self.problem.capacity.least, &self.problem.capacity.most);
        let missing: usize = self.counts.iter().zip(least).map(|(n, least)| least.saturating_sub(*n)).sum();
        if missing > left {
            return true;
        }
        if left == 0 {
            self.found.extend_from_slice(&self.row);
            return self.found.len() <= MOST * self.row.len();
        }
        for (rank, &most) in most.iter().enumerate() {
            if self.counts[rank] < most {
                (self.row[left - 1], self.counts[rank]) = (rank as u8, self.counts[rank] + 1);
                let whole = self.fill(left - 1);
                self.counts[rank] -= 1;
                if !whole {
                    return false;
                }
            }
        }
        true
    }
}

/// The renamings of ranks that change neither costs nor capacities nor speeds; the identity alone where there are
/// very many.
fn renamings(problem: &Problem) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    if !extend(problem, &mut Vec::new(), &mut found) {
        return vec![(0..problem.ranks as u8).collect()];
    }
    found
}

fn extend(problem: &Problem, names: &mut Vec<u8>, found: &mut Vec<Vec<u8>>) -> bool {
    let (r, at) = (problem.ranks, names.len());
    if at == r {
        found.push(names.clone());
        return found.len() <= MOST_RENAMINGS;
    }
    let (capacity, slowness) = (&problem.capacity, &problem.load.slowness);
    let alike = |to: usize, names: &[u8]| {
        let dist = |g: usize, h: usize| problem.dist[g * r + h];
        capacity.least[at] == capacity.least[to]
            && capacity.most[at] == capacity.most[to]
            && slowness.get(at) == slowness.get(to)
            && names.iter().enumerate().all(|(g, &name)| {
                let name = usize::from(name);
                name != to && dist(g, at) == dist(name, to) && dist(at, g) == dist(to, name)
            })
    };
    for to in 0..r {
        if alike(to, names) {
            names.push(to as u8);
            let whole = extend(problem, names, found);
            names.pop();
            if !whole {
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::affinity::Affinity;
    use crate::capacity::{Balance, Capacity, Memory};
    use crate::cost::Weights;
    use crate::load::LoadTerm;
    use crate::topology::Topology;

    fn states(experts: usize, topology: &Topology) -> Option<States> {
        let capacity = Capacity::new(2, experts, topology, Balance::Slots, &Memory::default()).unwrap();
        let affinity = Affinity::zeros(2, experts);
        States::new(&Problem::new(&affinity, topology, &Weights::default(), capacity, LoadTerm::default()))
    }

    #[test]
    fn counts_states_and_orbits() {
        let uniform = states(8, &Topology::uniform(4)).unwrap();
        assert_eq!((uniform.len(), uniform.orbits()), (2520, 105));
        let hosts = states(8, &Topology::hosts(2, 2, 1.0, 4.0)).unwrap();
        assert_eq!((hosts.len(), hosts.orbits()), (2520, 315));
        assert!(states(32, &Topology::uniform(8)).is_none());
    }

    #[test]
    fn weighs_every_state() {
        let states = states(5, &Topology::uniform(3)).unwrap();
        let table: Vec<f64> = (0..15).map(|i| f64::from(i * i % 11)).collect();
        let mut seen = 0;
        states.weigh(&table, |state, cost| {
            let row = states.row(state);
            let sum: f64 = row.iter().enumerate().map(|(e, &g)| table[usize::from(g) * 5 + e]).sum();
            assert_eq!(cost, sum);
            seen += 1;
        });
        assert_eq!(seen, states.len());
        let mut some = Vec::new();
        states.weigh_some(&table, &[0, 7, 3], |state, cost| some.push((state, cost)));
        states.weigh(&table, |state, cost| {
            assert!(![0, 3, 7].contains(&state) || some.contains(&(state, cost)))
        });
        assert_eq!(some.len(), 3);
    }
}

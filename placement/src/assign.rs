//! One layer, its neighbours fixed: a capacitated assignment, solved exactly by cancelling negative
//! cycles on the graph of ranks (Klein 1967). An arc g -> h carries the expert of g that is cheapest to
//! move to h; a cycle of negative sum is an improvement, and where there is none the layer is optimal.
//! An extra node stands for free slots, so that counts may change within their bounds.

/// One expert's change of rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shift {
    pub(crate) expert: u16,
    pub(crate) to: u16,
}

/// Scratch space for layers of one size.
#[derive(Debug, Clone)]
pub(crate) struct Assigner {
    nodes: usize,
    arc: Vec<f64>,
    carried: Vec<u16>,
    dist: Vec<f64>,
    parent: Vec<usize>,
    counts: Vec<usize>,
}

/// Bounds on the experts of a layer per rank, `[R]` each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds<'b> {
    pub(crate) least: &'b [usize],
    pub(crate) most: &'b [usize],
}

impl Assigner {
    pub(crate) fn new(ranks: usize) -> Self {
        let nodes = ranks + 1;
        Self {
            nodes,
            arc: vec![f64::INFINITY; nodes * nodes],
            carried: vec![0; nodes * nodes],
            dist: vec![0.0; nodes],
            parent: vec![usize::MAX; nodes],
            counts: vec![0; ranks],
        }
    }

    /// Improves `holders` `[E]` to the cheapest under `cost` `[R, E]`; `moved` receives every change in
    /// order. `holders` must respect the bounds. Gains below `epsilon` are not worth a cycle.
    pub(crate) fn solve(
        &mut self,
        cost: &[f64],
        holders: &mut [u16],
        bounds: Bounds<'_>,
        epsilon: f64,
        moved: &mut Vec<Shift>,
    ) {
        let ranks = self.nodes - 1;
        self.counts.fill(0);
        holders.iter().for_each(|&g| self.counts[g as usize] += 1);
        self.fill_arcs(cost, holders, None);
        self.fill_free_slots(bounds);
        // Each cycle lowers the cost by more than epsilon; the limit guards against rounding alone.
        for _ in 0..holders.len() * ranks + 16 {
            let Some(cycle) = self.swap(epsilon).or_else(|| self.negative_cycle(epsilon)) else { break };
            self.apply(&cycle, holders, moved);
            let mut touched = vec![false; self.nodes];
            cycle.iter().for_each(|&node| touched[node] = true);
            self.fill_arcs(cost, holders, Some(&touched));
            self.fill_free_slots(bounds);
        }
    }

    /// The cheapest expert from every (touched) rank to every rank.
    fn fill_arcs(&mut self, cost: &[f64], holders: &[u16], touched: Option<&[bool]>) {
        let (ranks, n, e) = (self.nodes - 1, self.nodes, holders.len());
        let skip = |g: usize| touched.is_some_and(|touched| !touched[g]);
        for g in (0..ranks).filter(|&g| !skip(g)) {
            self.arc[g * n..][..ranks].fill(f64::INFINITY);
        }
        for (expert, &g) in holders.iter().enumerate() {
            let g = g as usize;
            if skip(g) {
                continue;
            }
            let here = cost[g * e + expert];
            for h in 0..ranks {
                let gain = cost[h * e + expert] - here;
                if gain < self.arc[g * n + h] {
                    self.arc[g * n + h] = gain;
                    self.carried[g * n + h] = expert as u16;
                }
            }
        }
    }

    /// h -> free where h has a free slot; free -> g where g may lose an expert.
    fn fill_free_slots(&mut self, bounds: Bounds<'_>) {
        let (free, n) = (self.nodes - 1, self.nodes);
        for rank in 0..free {
            let open = |yes: bool| if yes { 0.0 } else { f64::INFINITY };
            self.arc[rank * n + free] = open(self.counts[rank] < bounds.most[rank]);
            self.arc[free * n + rank] = open(self.counts[rank] > bounds.least[rank]);
        }
    }

    /// The best exchange of two ranks, which is most of what there is to find.
    fn swap(&self, epsilon: f64) -> Option<Vec<usize>> {
        let n = self.nodes;
        let pairs = (0..n).flat_map(|g| (g + 1..n).map(move |h| (g, h)));
        let sum = |&(g, h): &(usize, usize)| self.arc[g * n + h] + self.arc[h * n + g];
        let best = pairs.min_by(|a, b| sum(a).total_cmp(&sum(b)))?;
        (sum(&best) < -epsilon).then(|| vec![best.0, best.1])
    }

    /// Bellman and Ford from all nodes at once; a cycle among the parents is a negative one.
    fn negative_cycle(&mut self, epsilon: f64) -> Option<Vec<usize>> {
        let n = self.nodes;
        self.dist.fill(0.0);
        self.parent.fill(usize::MAX);
        for _ in 0..n {
            let mut relaxed = None;
            for u in 0..n {
                let row = &self.arc[u * n..][..n];
                for (v, &arc) in row.iter().enumerate() {
                    if v != u && self.dist[u] + arc < self.dist[v] - epsilon {
                        self.dist[v] = self.dist[u] + arc;
                        self.parent[v] = u;
                        relaxed = Some(v);
                    }
                }
            }
            relaxed?;
            if let Some(cycle) = self.parent_cycle() {
                return Some(cycle);
            }
        }
        None
    }

    /// A cycle along the parents, in the direction of the arcs.
    fn parent_cycle(&self) -> Option<Vec<usize>> {
        let mut seen = vec![usize::MAX; self.nodes];
        for start in 0..self.nodes {
            let mut node = start;
            while node != usize::MAX && seen[node] == usize::MAX {
                seen[node] = start;
                node = self.parent[node];
            }
            if node != usize::MAX && seen[node] == start {
                let mut cycle = vec![node];
                let mut at = self.parent[node];
                while at != node {
                    cycle.push(at);
                    at = self.parent[at];
                }
                cycle.reverse();
                return Some(cycle);
            }
        }
        None
    }

    fn apply(&mut self, cycle: &[usize], holders: &mut [u16], moved: &mut Vec<Shift>) {
        let (free, n) = (self.nodes - 1, self.nodes);
        for (at, &g) in cycle.iter().enumerate() {
            let h = cycle[(at + 1) % cycle.len()];
            if g == free || h == free {
                continue;
            }
            let expert = self.carried[g * n + h];
            holders[expert as usize] = h as u16;
            self.counts[g] -= 1;
            self.counts[h] += 1;
            moved.push(Shift { expert, to: h as u16 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn brute(cost: &[f64], e: usize, bounds: Bounds<'_>) -> f64 {
        let ranks = bounds.most.len();
        let mut best = f64::INFINITY;
        for code in 0..ranks.pow(e as u32) {
            let holders: Vec<usize> = (0..e).map(|x| code / ranks.pow(x as u32) % ranks).collect();
            let count = |g: usize| holders.iter().filter(|&&h| h == g).count();
            if (0..ranks).all(|g| (bounds.least[g]..=bounds.most[g]).contains(&count(g))) {
                best = best.min(holders.iter().enumerate().map(|(x, &g)| cost[g * e + x]).sum());
            }
        }
        best
    }

    #[test]
    fn equals_brute_force() {
        let mut rng = Rng::new(1);
        for case in 0..200 {
            let (e, ranks) = (6, 2 + case % 3);
            let cost: Vec<f64> = (0..e * ranks).map(|_| rng.below(50) as f64).collect();
            let even = e / ranks;
            let slack = case % 2;
            let least: Vec<usize> = vec![even - slack; ranks];
            let most: Vec<usize> = vec![e.div_ceil(ranks) + slack; ranks];
            let bounds = Bounds { least: &least, most: &most };
            let mut holders: Vec<u16> = (0..e).map(|x| (x % ranks) as u16).collect();
            let mut moved = Vec::new();
            Assigner::new(ranks).solve(&cost, &mut holders, bounds, 1e-9, &mut moved);
            let found: f64 = holders.iter().enumerate().map(|(x, &g)| cost[g as usize * e + x]).sum();
            assert_eq!(found, brute(&cost, e, bounds), "case {case}");
        }
    }
}

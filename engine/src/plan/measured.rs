//! What was measured of a world: links by ping, ranks by timing their own kernels at several numbers of rows.

use super::Load;
use serde::{Deserialize, Serialize};

/// Seconds by number of rows: as measured at some, straight lines between them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve(pub Vec<(usize, f64)>);

impl Curve {
    /// Seconds for so many rows: nothing for none, beyond the last point on along the last line.
    pub fn at(&self, rows: usize) -> f64 {
        let (Some(&(first, least)), Some(&(last, most))) = (self.0.first(), self.0.last()) else {
            return 0.0;
        };
        match rows {
            0 => 0.0,
            rows if rows <= first => least,
            rows if rows >= last => most + self.slope() * (rows - last) as f64,
            rows => {
                let above = self.0.partition_point(|(n, _)| *n < rows);
                let ((a, s), (b, t)) = (self.0[above - 1], self.0[above]);
                s + (t - s) * (rows - a) as f64 / (b - a).max(1) as f64
            }
        }
    }

    /// Seconds that each further row takes, between the last two points.
    pub fn slope(&self) -> f64 {
        match self.0[..] {
            [.., (a, s), (b, t)] if b > a => ((t - s) / (b - a) as f64).max(0.0),
            _ => 0.0,
        }
    }
}

/// The same work under both strategies: keys and values are read back, and come from elsewhere, under `coherent` alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ByStrategy {
    /// Where tokens go home after every layer.
    pub vanilla: Curve,
    /// Where they stay with their experts.
    pub coherent: Curve,
}

impl ByStrategy {
    /// The curve of a strategy.
    pub fn of(&self, strategy: exflow_placement::Strategy) -> &Curve {
        match strategy {
            exflow_placement::Strategy::Vanilla => &self.vanilla,
            exflow_placement::Strategy::Coherent => &self.coherent,
        }
    }
}

/// What one rank takes, by rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankTimes {
    /// Flow: out of one layer's experts, through the next layer's attention, to its router.
    pub hop: ByStrategy,
    /// Flow: rows whose experts alone run here.
    pub serve: Curve,
    /// Flow: embedding and the first layer's attention.
    pub begin: Curve,
    /// Flow: the last layer's experts, head and choice.
    pub end: Curve,
    /// Rounds: attention and router, read back.
    pub attend: ByStrategy,
    /// Rounds: the rest of a layer, exchanges apart.
    pub work: ByStrategy,
    /// Rounds: head and choice.
    pub sample: Curve,
    /// How many times longer a hop takes while all ranks work at once: they may share cores or an adapter.
    pub crowded: f64,
    /// How much longer the first hop after a rest takes.
    #[serde(default)]
    pub waking: Waking,
}

/// Seconds that the first work after a rest of so many seconds takes more than the next: threads and cores fall asleep, the
/// deeper the longer nothing comes. As measured after some rests; straight lines between them, from nothing on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Waking(pub Vec<(f64, f64)>);

impl Waking {
    /// After a rest of so long; beyond the longest as after that.
    pub fn after(&self, rest_s: f64) -> f64 {
        let mut before = (0.0, 0.0);
        for &(rest, more) in &self.0 {
            if rest_s < rest {
                return before.1 + (more - before.1) * (rest_s - before.0).max(0.0) / (rest - before.0);
            }
            before = (rest, more);
        }
        before.1
    }
}

impl RankTimes {
    /// Makes everything take `factor` times as long.
    pub(super) fn stretch(&mut self, factor: f64) {
        self.seconds().for_each(|seconds| *seconds *= factor);
    }

    /// Of what was measured several times: in each place the one in the middle. A machine that does something else for a
    /// while disturbs all that is measured in that while.
    pub(crate) fn middle(mut passes: Vec<Self>) -> Self {
        let Some(mut middle) = passes.first().cloned() else { return Self::default() };
        let all: Vec<Vec<f64>> =
            passes.iter_mut().map(|pass| pass.seconds().map(|seconds| *seconds).collect()).collect();
        for (place, seconds) in middle.seconds().enumerate() {
            *seconds = median(all.iter().filter_map(|pass| pass.get(place).copied()).collect());
        }
        middle.crowded = median(passes.iter().map(|pass| pass.crowded).collect());
        middle
    }

    /// Every time in it.
    fn seconds(&mut self) -> impl Iterator<Item = &mut f64> {
        let both = [&mut self.hop, &mut self.attend, &mut self.work];
        let both = both.into_iter().flat_map(|by| [&mut by.vanilla, &mut by.coherent]);
        let one = [&mut self.serve, &mut self.begin, &mut self.end, &mut self.sample];
        let curves = both.chain(one).flat_map(|curve| curve.0.iter_mut().map(|(_, seconds)| seconds));
        curves.chain(self.waking.0.iter_mut().map(|(_, seconds)| seconds))
    }
}

/// The middle of the values; 0 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// What lies between two ranks, one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkTime {
    /// α: seconds that a small message takes.
    pub latency_s: f64,
    /// 1/β.
    pub bytes_per_s: f64,
    /// Processor seconds that a small message takes at either end.
    pub message_s: f64,
}

impl LinkTime {
    /// Seconds until a message of so many bytes has come: `α + β · bytes`.
    pub fn seconds(&self, bytes: f64) -> f64 {
        self.latency_s + bytes / self.bytes_per_s
    }
}

/// What was measured of a world that did nothing else.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measurements {
    /// `[R]`.
    pub ranks: Vec<RankTimes>,
    /// `[R][R]` from row to column.
    pub links: Vec<Vec<LinkTime>>,
    /// Seconds of an exchange of small payloads that all ranks take part in.
    pub exchange_s: f64,
    /// What trials came to, which were run after the rest was measured.
    #[serde(default)]
    pub loads: Vec<Load>,
}

impl Measurements {
    /// R.
    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// How many ranks can work at full speed at once, as one of them sees it.
    pub fn lanes(&self, rank: usize) -> f64 {
        self.world_size() as f64 / self.ranks[rank].crowded.max(1.0)
    }

    /// The link from one rank to another.
    pub fn link(&self, from: usize, to: usize) -> LinkTime {
        self.links[from][to]
    }

    /// Bytes per second that a rank can send, to its fastest peer.
    pub fn uplink(&self, rank: usize) -> f64 {
        let others = (0..self.world_size()).filter(|to| *to != rank);
        others.map(|to| self.links[rank][to].bytes_per_s).fold(0.0, f64::max).max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_straight_between_points_and_beyond_them() {
        let curve = Curve(vec![(1, 1.0), (4, 2.5), (16, 4.5)]);
        for (rows, seconds) in [(0, 0.0), (1, 1.0), (2, 1.5), (4, 2.5), (10, 3.5), (16, 4.5), (22, 5.5)] {
            assert!((curve.at(rows) - seconds).abs() < 1e-12, "{rows}");
        }
        assert_eq!(Curve::default().at(7), 0.0);
        assert_eq!(Curve(vec![(4, 2.0)]).at(9), 2.0);
    }

    #[test]
    fn a_disturbed_pass_does_not_count() {
        let pass = |s: f64, crowded: f64| {
            let (serve, waking) = (Curve(vec![(1, s), (4, 2.0 * s)]), Waking(vec![(0.01, s)]));
            RankTimes { serve, waking, crowded, ..RankTimes::default() }
        };
        let middle = RankTimes::middle(vec![pass(1.0, 2.0), pass(40.0, 1.0), pass(1.5, 9.0)]);
        assert_eq!(middle, pass(1.5, 2.0));
        assert_eq!(RankTimes::middle(Vec::new()), RankTimes::default());
    }

    #[test]
    fn who_rests_longer_wakes_slower() {
        let waking = Waking(vec![(0.001, 0.0001), (0.003, 0.0005)]);
        for (rest, more) in [(0.0, 0.0), (0.0005, 0.00005), (0.001, 0.0001), (0.002, 0.0003), (1.0, 0.0005)] {
            assert!((waking.after(rest) - more).abs() < 1e-12, "{rest}");
        }
        assert_eq!(Waking::default().after(1.0), 0.0);
    }
}

//! How long a rank in flow holds back rows that are ready, so that others may share their launch; and whether that pays,
//! which is measured while running.
//!
//! A launch takes a fixed time and some more by the row, and now and then a row comes just after one of its layer has
//! begun. Holding launches back for a little lets such rows go along, and tokens that go along once stay together. What that
//! can save is the fixed part of their launches; what it costs is latency, so that it pays only where launches are dear and
//! keep ranks busy. So ranks watch what launches take and miss; where enough could be saved they try it out: spans of so many
//! sampled tokens are run with and without, by turns, and it is kept where the world's tokens per second became better.
//! Every rank hears every sampled id, so all of them measure the same thing at about the same time, and nobody need agree on
//! anything.

use super::board::{Picked, Ready};
use crate::options::Linger;
use std::collections::HashMap;
use std::time::Duration;

/// Waits that are tried, in fixed costs of a launch.
const WAITS: [f64; 2] = [0.25, 0.5];
/// No row is held back for longer, whatever a launch costs.
const MOST: Duration = Duration::from_millis(20);
/// Share of the launches' time that a wait must be able to save to be tried, and of all time that they must take.
const PROMISE: f64 = 0.02;
const BUSY: f64 = 0.5;
/// Launches that are watched before.
const WATCHED: u32 = 64;
/// A span: so many tokens of every sequence, the first of which are not counted: tokens that go along stay together for a
/// while.
const SPAN: usize = 8;
const SETTLING: usize = 3;
/// Spans of each kind in a trial; a wait that made less than this of what none did in all of the first few is given up.
const TRIED: usize = 5;
const FIRST: usize = 2;
const WORSE: f64 = 0.98;
/// How many times as many tokens per second a wait must make to be kept, where there was none.
const WORTH: f64 = 1.05;
/// Spans after which it is looked at again.
const KEPT: usize = 100;
/// A launch has enough rows where the fixed part is less than this of its cost.
const ENOUGH: f64 = 0.2;

/// What launches take by their rows: a straight line through what was seen lately.
#[derive(Debug, Clone, Copy, Default)]
struct Costs {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_squared: f64,
    both: f64,
}

impl Costs {
    /// What a value weighs against the one after it.
    const FADE: f64 = 0.995;

    fn take(&mut self, rows: usize, seconds: f64) {
        let (n, keep) = (rows as f64, Self::FADE);
        self.weight = keep * self.weight + 1.0;
        self.rows = keep * self.rows + n;
        self.seconds = keep * self.seconds + seconds;
        self.rows_squared = keep * self.rows_squared + n * n;
        self.both = keep * self.both + n * seconds;
    }

    /// Seconds of a launch, and of each row; none while all launches had as many rows.
    fn line(&self) -> Option<(f64, f64)> {
        let (n, s) = (self.rows / self.weight, self.seconds / self.weight);
        let spread = self.rows_squared / self.weight - n * n;
        let slope = ((self.both / self.weight - n * s) / spread).max(0.0);
        // A line cannot start below nothing.
        let slope = slope.min(s / n.max(1.0));
        (self.weight > 0.0 && spread > 1e-3).then_some((s - slope * n, slope))
    }
}

/// What is seen of launches while nothing is held back.
#[derive(Debug, Clone, Default)]
struct Watch {
    /// When the last launch of each stage began.
    last: HashMap<usize, Duration>,
    launches: u32,
    rows: usize,
    /// Rows that a launch missed, because they came after it had begun, by the wait that would have had them along.
    missed: [usize; WAITS.len()],
    began: Option<Duration>,
    busy: f64,
}

impl Watch {
    fn launched(&mut self, now: Duration, picked: &Picked, fixed: f64) {
        if let Some(last) = self.last.insert(picked.stage, now) {
            for ready in picked.ready_at(now) {
                let late = ready.saturating_sub(last).as_secs_f64();
                for (missed, wait) in self.missed.iter_mut().zip(WAITS) {
                    *missed += usize::from(ready > last && late < wait * fixed);
                }
            }
        }
        self.began.get_or_insert(now);
        (self.launches, self.rows) = (self.launches + 1, self.rows + picked.rows());
    }

    /// Whether waiting could save enough, where a launch and a row cost so much.
    fn promises(&self, now: Duration, (fixed, slope): (f64, f64)) -> bool {
        let passed = now.saturating_sub(self.began.unwrap_or(now)).as_secs_f64();
        let per_launch = |count: usize| count as f64 / f64::from(self.launches.max(1));
        let rows = per_launch(self.rows).max(1.0);
        let missed = self.missed.iter().copied().max().unwrap_or(0);
        // A row that goes along saves its part of the launch that it would have been in.
        let saved = per_launch(missed) / rows * fixed / (fixed + rows * slope).max(1e-12);
        saved > PROMISE && self.busy > BUSY * passed
    }
}

/// What is known of waiting with about so many sequences.
#[derive(Debug, Clone)]
enum Phase {
    /// Nothing waits; launches are watched.
    Watch,
    /// Tokens per second without waiting and with each wait, by turns; and the wait that was kept before.
    Try { rates: Rates, before: usize },
    /// The wait that is kept, 0 for none, for so many more spans.
    Keep { wait: usize, left: usize },
}

/// Of spans without waiting, and with each wait.
type Rates = [Vec<f64>; 1 + WAITS.len()];

/// The span that runs: when its counted part began, and the tokens in it.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    tokens: usize,
    began: Duration,
}

/// A rank's own verdict.
#[derive(Debug)]
pub(crate) struct Lingering {
    option: Linger,
    costs: Costs,
    watch: Watch,
    /// By number of sequences, rounded up to a power of two.
    phases: HashMap<usize, Phase>,
    size: usize,
    span: Span,
}

impl Lingering {
    pub(crate) fn new(option: Linger) -> Self {
        let (costs, watch) = (Costs::default(), Watch::default());
        Self { option, costs, watch, phases: HashMap::new(), size: 0, span: Span::default() }
    }

    /// How long what is ready is held back yet, of which no other row that could come is; none where it is to go.
    /// `running` sequences are under way.
    pub(crate) fn left(&self, ready: &Ready, running: usize) -> Option<Duration> {
        let enough = self.costs.line().is_some_and(|(fixed, slope)| {
            let rows = ready.rows as f64;
            fixed < ENOUGH * (fixed + rows * slope)
        });
        if ready.prefill || ready.all >= running || enough {
            return None;
        }
        self.bound().checked_sub(ready.held).filter(|left| !left.is_zero())
    }

    /// How long a row may be held back at the moment.
    fn bound(&self) -> Duration {
        let Linger::For(bound) = self.option else {
            let wait = self.wait().checked_sub(1).map_or(0.0, |wait| WAITS[wait]);
            let fixed = self.costs.line().map_or(0.0, |(fixed, _)| fixed);
            return Duration::from_secs_f64((wait * fixed).max(0.0)).min(MOST);
        };
        bound
    }

    /// Which wait the running span is run with; 0 is none.
    fn wait(&self) -> usize {
        match self.phases.get(&self.size) {
            _ if self.option != Linger::Auto => 0,
            Some(Phase::Try { rates, .. }) => {
                // Each in turn: what the machine does beside them hits all alike.
                let open = (0..rates.len()).filter(|&wait| is_open(rates, wait));
                open.min_by_key(|&wait| rates[wait].len()).unwrap_or(0)
            }
            Some(Phase::Keep { wait, .. }) => *wait,
            Some(Phase::Watch) | None => 0,
        }
    }

    /// What was picked goes to the device.
    pub(crate) fn launched(&mut self, now: Duration, picked: &Picked) {
        if self.option == Linger::Auto
            && !picked.prefill
            && let Some((fixed, _)) = self.costs.line()
        {
            self.watch.launched(now, picked, fixed);
        }
    }

    /// A launch with so many rows of decoded tokens took so long.
    pub(crate) fn hopped(&mut self, rows: usize, seconds: f64) {
        self.costs.take(rows, seconds);
        self.watch.busy += seconds;
    }

    /// A sampled id was heard while `running` sequences were under way.
    pub(crate) fn heard(&mut self, now: Duration, running: usize) {
        let size = running.next_power_of_two();
        if std::mem::replace(&mut self.size, size) != size {
            (self.span, self.watch) = (Span::default(), Watch::default());
        }
        self.span.tokens += 1;
        if self.span.tokens == SETTLING * running {
            self.span.began = now;
        }
        if self.span.tokens >= SPAN * running {
            let counted = (self.span.tokens - SETTLING * running) as f64;
            let seconds = now.saturating_sub(self.span.began).as_secs_f64();
            self.span = Span::default();
            if self.option == Linger::Auto && running > 1 {
                self.spanned(now, counted / seconds.max(1e-9));
            }
        }
    }

    /// Nothing runs: what comes next is another span.
    pub(crate) fn rested(&mut self) {
        self.span = Span::default();
    }

    /// A span came to so many tokens per second.
    fn spanned(&mut self, now: Duration, rate: f64) {
        let ran = self.wait();
        let try_out = |before| Phase::Try { rates: Rates::default(), before };
        match self.phases.entry(self.size).or_insert(Phase::Watch) {
            Phase::Watch if self.watch.launches < WATCHED => {}
            phase @ Phase::Watch => {
                let watch = std::mem::take(&mut self.watch);
                *phase = match self.costs.line().is_some_and(|line| watch.promises(now, line)) {
                    true => try_out(0),
                    false => Phase::Keep { wait: 0, left: KEPT },
                };
            }
            phase @ Phase::Try { .. } => {
                let Phase::Try { rates, before } = phase else { return };
                rates[ran].push(rate);
                if (0..rates.len()).all(|wait| !is_open(rates, wait)) {
                    *phase = Phase::Keep { wait: best(rates, *before), left: KEPT };
                }
            }
            Phase::Keep { left, .. } if *left > 1 => *left -= 1,
            phase @ Phase::Keep { .. } => {
                let Phase::Keep { wait, .. } = *phase else { return };
                *phase = if wait > 0 { try_out(wait) } else { Phase::Watch };
                self.watch = Watch::default();
            }
        }
    }
}

/// In how many of the spans of both a wait made more than `times` what none did, and how many there are.
fn wins(rates: &Rates, wait: usize, times: f64) -> (usize, usize) {
    let pairs = rates[0].iter().zip(&rates[wait]);
    (pairs.clone().filter(|(without, with)| **with > times * **without).count(), pairs.count())
}

/// Whether more spans of a kind are wanted: nobody needs those without waiting when every wait is given up.
fn is_open(rates: &Rates, wait: usize) -> bool {
    let given_up = |wait: usize| matches!(wins(rates, wait, WORSE), (0, of) if of >= FIRST);
    match wait {
        0 => rates[0].len() < TRIED && !(1..rates.len()).all(given_up),
        wait => rates[wait].len() < TRIED && !given_up(wait),
    }
}

/// The wait of the most tokens per second, where it was better in all of the spans and by enough; where it was
/// waited before, where it was no worse.
fn best(rates: &Rates, before: usize) -> usize {
    let rate = |wait: usize| median(&rates[wait]);
    let best = (1..rates.len()).max_by(|&a, &b| rate(a).total_cmp(&rate(b))).unwrap_or(0);
    let (won, of) = wins(rates, best, 1.0);
    let is_better = match before {
        0 => won == of && of >= TRIED && rate(best) > WORTH * rate(0),
        _ => of >= TRIED && rate(best) >= rate(0),
    };
    if is_better { best } else { 0 }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
#[path = "linger_tests.rs"]
mod tests;

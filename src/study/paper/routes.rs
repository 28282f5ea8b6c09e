//! Checks on routes alone: is the affinity real, how much text shows it, does it hold elsewhere, how did it come about.

use super::evidence::Evidence;
use super::{RoutingHistory, done, open};
use crate::report::CheckFacts;
use exflow_placement::{Affinity, PlacementTable, Rng, SolveError, score_affinity};

/// Shuffles of the control.
const SHUFFLES: usize = 199;
/// Sizes of profile that are tried.
const SIZES: [f64; 9] = [100.0, 300.0, 1000.0, 2000.0, 3000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0];
/// Most pairs of a layer that are shuffled: enough for a test, and a second of work.
const MOST_PAIRS: f64 = 20_000.0;

/// Whether the next expert depends on the last: mutual information against shuffled tokens.
pub(super) fn affinity(evidence: &Evidence<'_>) -> CheckFacts {
    let claim =
        "the expert of a layer depends on the expert before it (section 3): more than popularity explains";
    let counts = &evidence.whole;
    let mut rng = Rng::fork(evidence.options.seed, 0xaff1);
    let mut pairs: Vec<[Vec<u16>; 2]> =
        (0..counts.layers - 1).map(|l| expanded(counts, l, &mut rng)).collect();
    if pairs.iter().all(|[from, _]| from.len() < 2) {
        return open("affinity is real", claim, "the counts hold no transitions");
    }
    let e = counts.experts;
    let mean = |pairs: &[[Vec<u16>; 2]]| {
        pairs.iter().map(|pair| information(pair, e)).sum::<f64>() / pairs.len().max(1) as f64
    };
    let found = mean(&pairs);
    let shuffled: Vec<f64> = (0..SHUFFLES)
        .map(|_| {
            pairs.iter_mut().for_each(|[_, to]| rng.shuffle(to));
            mean(&pairs)
        })
        .collect();
    let above = shuffled.iter().filter(|&&value| value >= found).count();
    let p = (above + 1) as f64 / (SHUFFLES + 1) as f64;
    let control = shuffled.iter().sum::<f64>() / SHUFFLES as f64;
    let figure = format!(
        "{found:.3} bits between adjacent layers, {control:.3} after shuffling tokens; permutation test with {SHUFFLES} shuffles: p = {p:.3}"
    );
    done("affinity is real", claim, p <= 0.01, figure)
}

/// Both ends of every transition of a layer, at most [`MOST_PAIRS`] of them.
fn expanded(counts: &Affinity, layer: usize, rng: &mut Rng) -> [Vec<u16>; 2] {
    let (e, cells) = (counts.experts, counts.transition(layer));
    let share = (MOST_PAIRS / cells.iter().sum::<f64>().max(1.0)).min(1.0);
    let (mut from, mut to) = (Vec::new(), Vec::new());
    for (at, &count) in cells.iter().enumerate() {
        let exact = count * share;
        let whole = exact.floor() as usize + usize::from(rng.unit() < exact.fract());
        from.extend(std::iter::repeat_n((at / e) as u16, whole));
        to.extend(std::iter::repeat_n((at % e) as u16, whole));
    }
    [from, to]
}

/// Mutual information of paired experts, in bits.
fn information([from, to]: &[Vec<u16>; 2], e: usize) -> f64 {
    let mut cells = vec![0.0; e * e];
    from.iter().zip(to).for_each(|(&i, &j)| cells[usize::from(i) * e + usize::from(j)] += 1.0);
    bits(&cells, e)
}

/// Mutual information of `[E, E]` counts, in bits.
fn bits(cells: &[f64], e: usize) -> f64 {
    let total: f64 = cells.iter().sum();
    let rows: Vec<f64> = cells.chunks_exact(e).map(|row| row.iter().sum()).collect();
    let mut columns = vec![0.0; e];
    cells.iter().enumerate().for_each(|(at, count)| columns[at % e] += count);
    let term = |(at, &count): (usize, &f64)| match count {
        0.0 => 0.0,
        _ => count / total * (count * total / (rows[at / e] * columns[at % e])).log2(),
    };
    cells.iter().enumerate().map(term).sum()
}

/// How much a small profile loses.
pub(super) fn profile_size(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim = "1,000 to 3,000 tokens are enough to profile (section 5; the authors' solver takes 5,000)";
    let tokens = evidence.profile.tokens();
    let moves = |table: &PlacementTable| evidence.score(table).crossings_per_token;
    let best = moves(&evidence.table);
    let mut values = Vec::new();
    for size in SIZES.into_iter().filter(|&size| size < tokens) {
        let (part, _) = evidence.profile.split(size / tokens, evidence.options.seed + size as u64);
        let table = evidence.solved(&part, &evidence.topology())?;
        values.push((format!("{size:.0}"), moves(&table) / best));
    }
    values.push((format!("{tokens:.0}"), 1.0));
    let at =
        |size: f64| values.iter().find(|(name, _)| *name == format!("{size:.0}")).map(|(_, ratio)| *ratio);
    let Some(three) = at(3000.0) else {
        let wanted = "give a trace of more than 12,000 tokens, half of which are kept back";
        return Ok(CheckFacts { values, ..open("profile size", claim, wanted) });
    };
    let list: Vec<String> =
        values.iter().map(|(size, ratio)| format!("{size}: {:+.1} %", 100.0 * (ratio - 1.0))).collect();
    let figure =
        format!("crossings on unseen tokens over those after {tokens:.0} tokens: {}", list.join(", "));
    Ok(CheckFacts { values, ..done("profile size", claim, three <= 1.03, figure) })
}

/// Whether a table that was solved on one text serves another.
pub(super) fn another_domain(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let name = "another domain";
    let claim =
        "a placement learnt on one corpus holds on others: 0.989 to 1.005 of its affinity on C4, Dolma, Yelp";
    let mut parts = Vec::new();
    let mut worst = f64::INFINITY;
    for (file, trace) in evidence.others {
        let counts = Affinity::from_trace(trace, evidence.profile.experts)?;
        let (own, unseen) = counts.split(0.5, evidence.options.seed);
        let score = |table: &PlacementTable| score_affinity(table, &unseen, &evidence.topology());
        let (there, here) = (score(&evidence.table), score(&evidence.solved(&own, &evidence.topology())?));
        let even = score(&evidence.round_robin(evidence.options.ranks));
        worst = worst.min(there.stay_rate / here.stay_rate.max(f64::MIN_POSITIVE));
        parts.push(format!(
            "{file}: stay rate {:.3} with our table, {:.3} with one solved on that text, {:.3} round-robin",
            there.stay_rate, here.stay_rate, even.stay_rate
        ));
    }
    if parts.is_empty() {
        return Ok(open(name, claim, "give a second trace, of another text"));
    }
    let figure = format!("{}; the least share kept is {worst:.3}", parts.join("; "));
    Ok(done(name, claim, worst >= 0.95, figure))
}

/// How affinity came about during training.
pub(super) fn training(history: Option<&RoutingHistory>) -> CheckFacts {
    let name = "training evolution";
    let claim = "affinity is very high at first, when few experts are used, falls as the balance loss acts, then rises \
                 slowly and settles (figure 12)";
    let Some(history) = history.filter(|history| history.steps.len() >= 8) else {
        return open(name, claim, "give -m MODEL with a routing_history.npz of eight checkpoints or more");
    };
    let information: Vec<f64> = history.counts.iter().map(mean_bits).collect();
    let used: Vec<f64> = history.counts.iter().map(experts_used).collect();
    let values: Vec<(String, f64)> =
        history.steps.iter().zip(&information).map(|(step, bits)| (format!("{step:.0}"), *bits)).collect();
    let last = information.len() - 1;
    let peak = (0..=last).fold(0, |best, at| if information[at] > information[best] { at } else { best });
    let low =
        (peak..=last).fold(peak, |best, at| if information[at] < information[best] { at } else { best });
    let tail = &information[last - last / 4..];
    let spread =
        tail.iter().copied().fold(0.0, f64::max) / tail.iter().copied().fold(f64::INFINITY, f64::min);
    let early = history.steps[peak] <= 0.1 * history.steps[last];
    let pass = early && information[peak] > 1.5 * information[low] && low < last && spread <= 1.1;
    let figure = format!(
        "over {} checkpoints: {:.2} bits at step {:.0} ({:.1} of {} experts in use at step {:.0}), {:.2} at step {:.0}, \
         {:.2} at the end ({:.1} in use); the last quarter within {:.0} %",
        history.steps.len(),
        information[peak],
        history.steps[peak],
        used[0],
        history.counts[0].experts,
        history.steps[0],
        information[low],
        history.steps[low],
        information[last],
        used[last],
        100.0 * (spread - 1.0)
    );
    CheckFacts { values, ..done(name, claim, pass, figure) }
}

fn mean_bits(counts: &Affinity) -> f64 {
    let pairs = counts.layers.saturating_sub(1);
    (0..pairs).map(|layer| bits(counts.transition(layer), counts.experts)).sum::<f64>() / pairs.max(1) as f64
}

/// Experts that share the load, as the exponential of its entropy, mean over layers.
fn experts_used(counts: &Affinity) -> f64 {
    let load = counts.load_or_derived();
    let of = |row: &[f64]| {
        let total: f64 = row.iter().sum();
        let entropy =
            |&tokens: &f64| if tokens > 0.0 { -tokens / total * (tokens / total).ln() } else { 0.0 };
        row.iter().map(entropy).sum::<f64>().exp()
    };
    load.chunks_exact(counts.experts).map(of).sum::<f64>() / counts.layers as f64
}

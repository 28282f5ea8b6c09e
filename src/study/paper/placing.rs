//! Checks on placements: what they keep on a rank and on a host, how soon they are found, what they cost in memory and
//! in balance.

use super::done;
use super::evidence::Evidence;
use crate::report::CheckFacts;
use crate::study::placing::independent;
use exflow_placement::{
    LayerId, PlacementTable, Score, SolveError, SolveOptions, Topology, score_affinity, solve,
};

/// Stay rate on tokens that were not profiled, against what popularity alone gives.
pub(super) fn stay_rate(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim = "placed by affinity, more tokens stay on their rank than by any placement blind to it, on unseen text";
    let ranks = evidence.options.ranks;
    let (own, even) = (evidence.score(&evidence.table), evidence.score(&evidence.round_robin(ranks)));
    let (layers, experts) = (evidence.profile.layers, evidence.profile.experts);
    let linear = evidence.score(&PlacementTable::linear(layers, experts, ranks));
    let popular = evidence.solved(&independent(&evidence.profile), &evidence.topology())?;
    let popular = evidence.score(&popular);
    let best = even.stay_rate.max(linear.stay_rate).max(popular.stay_rate);
    let figure = format!(
        "{ranks} ranks, {:.0} unseen tokens: {:.1} % stay, {:.1} % round-robin, {:.1} % linear, {:.1} % by popularity alone, chance {:.1} %; busiest \
         rank over the mean {:.2} against {:.2}",
        evidence.unseen.tokens(),
        100.0 * own.stay_rate,
        100.0 * even.stay_rate,
        100.0 * linear.stay_rate,
        100.0 * popular.stay_rate,
        100.0 / ranks as f64,
        own.worst_load,
        even.worst_load
    );
    Ok(done("stay rate", claim, own.stay_rate >= 1.2 * best, figure))
}

/// More experts on a rank: more to gain.
pub(super) fn experts_per_rank(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim =
        "the more experts a rank holds, the more crossings affinity saves: 40 % with 16 a rank, 25 % with 2";
    let experts = evidence.profile.experts;
    let mut values = Vec::new();
    for ranks in
        [2, 4, 8, 16, 32].into_iter().filter(|&ranks| ranks < experts && experts.is_multiple_of(ranks))
    {
        let table = evidence.solved(&evidence.profile, &Topology::uniform(ranks))?;
        let moves = |table: &PlacementTable| evidence.score(table).crossings_per_token;
        let saved = 1.0 - moves(&table) / moves(&evidence.round_robin(ranks)).max(f64::MIN_POSITIVE);
        values.push((format!("{}", experts / ranks), saved));
    }
    let list: Vec<String> =
        values.iter().map(|(each, saved)| format!("{each} a rank: {:.1} %", 100.0 * saved)).collect();
    let falling = values.windows(2).all(|pair| pair[0].1 >= pair[1].1 - 0.01);
    let (first, last) = (values.first().map_or(0.0, |v| v.1), values.last().map_or(0.0, |v| v.1));
    let figure = format!("crossings saved against round-robin on unseen tokens: {}", list.join(", "));
    let pass = values.len() >= 2 && falling && first > last && last > 0.0;
    Ok(CheckFacts { values, ..done("experts per rank", claim, pass, figure) })
}

/// Hosts first, then ranks.
pub(super) fn two_levels(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim =
        "placed on nodes first, then on the GPUs of each, about twice as many tokens stay on their node";
    let ranks = evidence.options.ranks;
    if ranks < 4 || !ranks.is_multiple_of(2) {
        return Ok(super::open("two levels", claim, "ask for four ranks or more, an even number (--ranks)"));
    }
    let hosts = Topology::hosts(2, ranks / 2, 1.0, 10.0);
    let table = evidence.solved(&evidence.profile, &hosts)?;
    let score = |table: &PlacementTable| score_affinity(table, &evidence.unseen, &hosts);
    let (own, flat, even) = (score(&table), score(&evidence.table), score(&evidence.round_robin(ranks)));
    let total = score(&evidence.in_total(&hosts)?);
    let away = |share: f64| 100.0 * (1.0 - share);
    let gone =
        |of: &Score| 1.0 - (1.0 - of.host_stay_rate) / (1.0 - even.host_stay_rate).max(f64::MIN_POSITIVE);
    let figure = format!(
        "two hosts of {} ranks, unseen tokens: {:.1} % of transitions leave the host where each layer is spread evenly, {:.1} % with a \
         table blind to hosts, {:.1} % round-robin: {:.0} % of crossings between hosts gone; {:.1} % where experts are spread evenly in \
         total (--balance total): {:.0} % gone; stay rate on host {:.2} and {:.2} times round-robin's",
        ranks / 2,
        away(own.host_stay_rate),
        away(flat.host_stay_rate),
        away(even.host_stay_rate),
        100.0 * gone(&own),
        away(total.host_stay_rate),
        100.0 * gone(&total),
        own.host_stay_rate / even.host_stay_rate.max(f64::MIN_POSITIVE),
        total.host_stay_rate / even.host_stay_rate.max(f64::MIN_POSITIVE)
    );
    // On two hosts chance keeps half: twice as many would be all. Half of the crossings gone, by either balance, is what we hold it to.
    Ok(done("two levels", claim, gone(&own).max(gone(&total)) >= 0.5, figure))
}

/// How soon the placement was there.
pub(super) fn solve_time(evidence: &Evidence<'_>) -> CheckFacts {
    let claim = "the authors give a commercial solver 60 s for each of its steps; ours needs none";
    let table = &evidence.table;
    let last = table.history.last().map_or(0.0, |moment| moment.cost);
    let near = table.history.iter().find(|moment| moment.cost <= 1.005 * last).map_or(0.0, |m| m.seconds);
    let gap = table.gap.unwrap_or(1.0);
    let figure = format!(
        "{} layers × {} experts on {} ranks, one thread: within 0.5 % of its end after {:.0} ms; proven within {:.1} % of \
         the best possible after {:.1} s",
        table.layers,
        table.experts,
        table.ranks,
        1e3 * near,
        100.0 * gap,
        table.history.last().map_or(0.0, |moment| moment.seconds)
    );
    done("solve time", claim, near <= 1.0 && gap <= 0.10, figure)
}

/// Contexts that coherence keeps on several ranks.
pub(super) fn contexts(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim = "coherence keeps every context on every GPU: K/V memory is R times that of data parallel";
    let ranks = evidence.options.ranks as f64;
    let held = |table: &PlacementTable| {
        let domains = (0..table.layers).map(|layer| table.ranks_of(LayerId::from(layer)).len());
        domains.sum::<usize>() as f64 / table.layers as f64
    };
    let total = evidence.in_total(&evidence.topology())?;
    let (spread, few) = (held(&evidence.table), held(&total));
    let moves = |table: &PlacementTable| evidence.score(table).crossings_per_token;
    let figure = format!(
        "each layer's K/V lies on {spread:.2} of {ranks:.0} ranks where layers are spread evenly, on {few:.2} with --balance \
         total, which crosses {:.2} instead of {:.2} times a token",
        moves(&total),
        moves(&evidence.table)
    );
    Ok(done("K/V memory", claim, few < ranks && moves(&total) <= moves(&evidence.table), figure))
}

/// What affinity does to balance, and what bounding it costs.
pub(super) fn load_balance(evidence: &Evidence<'_>) -> Result<CheckFacts, SolveError> {
    let claim = "the paper's program ignores load; bounded to 1.15 times round-robin's busiest rank, placement by affinity \
                 loses 3 % at most";
    let options = SolveOptions { load_bound: Some(1.15), ..evidence.options.solving() };
    let bounded = solve(&evidence.profile, &evidence.topology(), &options, &mut |_| ())?;
    let price = bounded.cost.unwrap_or(0.0) / evidence.table.cost.unwrap_or(1.0).max(f64::MIN_POSITIVE) - 1.0;
    let worst = |table: &PlacementTable| evidence.score(table).worst_load;
    let even = worst(&evidence.round_robin(evidence.options.ranks));
    let figure = format!(
        "busiest rank over the mean in the worst layer, unseen tokens: {:.2} by affinity alone, {:.2} bounded, {even:.2} \
         round-robin; the bound costs {:.1} % more crossings",
        worst(&evidence.table),
        worst(&bounded),
        100.0 * price
    );
    Ok(done("load balance", claim, price <= 0.03, figure))
}

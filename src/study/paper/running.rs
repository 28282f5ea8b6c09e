//! Checks on runs: what `exflow bench` and `exflow bench strategies` measured, and replays of routes where they suffice.

use super::evidence::Evidence;
use super::{done, open};
use crate::report::{CheckFacts, StrategyFacts};
use crate::study::Gathered;
use exflow_placement::{Link, SimulateOptions, Simulation, Strategy, simulate};

/// The link that the exchange's latency is told for: one way 2 ms, 0.1 Gbit/s.
const LINK: Link = Link { latency_us: 2000.0, gbit_per_s: 0.1 };

/// Every setting produced the same tokens.
pub(super) fn lossless(found: &Gathered) -> CheckFacts {
    let claim = "no token is dropped or changed: every strategy and placement gives the same output";
    let runs: Vec<bool> = found.benches.iter().map(|bench| bench.same_tokens).collect();
    // `exflow bench strategies` gives no rows where tokens differ.
    let rows: Vec<bool> = found.strategies.iter().map(|row| row.same_tokens.unwrap_or(true)).collect();
    if runs.is_empty() && rows.is_empty() {
        return open("lossless", claim, "give the JSON of `exflow bench`");
    }
    let settings: usize = found.benches.iter().map(|bench| bench.settings.len()).sum();
    let pass = runs.iter().chain(&rows).all(|same| *same);
    let word = if pass { "the same tokens" } else { "different tokens" };
    done("lossless", claim, pass, format!("{} settings run side by side: {word}", settings + rows.len()))
}

/// Exchanges per MoE layer, counted on the wire.
pub(super) fn one_exchange(found: &Gathered) -> CheckFacts {
    let claim = "one Alltoall a layer instead of two (section 4.1), top-1";
    let settings = found.benches.iter().filter(|bench| bench.model.top_k == 1).flat_map(|b| &b.settings);
    let mut counted: Vec<(String, f64)> =
        settings.map(|s| (s.strategy.clone(), s.exchanges_per_layer)).collect();
    let rounds = top_1(&found.strategies).filter(|row| row.schedule == "rounds" && row.ranks > 1);
    counted.extend(rounds.map(|row| (row.strategy.clone(), row.exchanges_per_layer)));
    let of = |strategy: &str| -> Vec<f64> {
        counted.iter().filter(|(name, _)| name == strategy).map(|(_, exchanges)| *exchanges).collect()
    };
    let (coherent, vanilla) = (of("coherent"), of("vanilla"));
    if coherent.is_empty() || vanilla.is_empty() {
        return open("one exchange", claim, "give the JSON of `exflow bench` or `exflow bench strategies`");
    }
    let most = coherent.iter().copied().fold(0.0, f64::max);
    let least = vanilla.iter().copied().fold(f64::INFINITY, f64::min);
    let figure =
        format!("at most {most:.2} with coherent, at least {least:.2} with vanilla, counted on the wire");
    done("one exchange", claim, most <= 1.05 && least >= 1.9, figure)
}

/// Bytes of rows: half of vanilla's with the same placement, fewer with affinity's.
pub(super) fn volume_law(found: &Gathered, evidence: &Evidence<'_>) -> CheckFacts {
    let claim = "rows travel once, not twice: 2·L·p vectors a token become L·p* (table I)";
    let layers = evidence.profile.layers as f64;
    let even = evidence.round_robin(evidence.options.ranks);
    let p = 1.0 - evidence.score(&even).stay_rate;
    let p_star = 1.0 - evidence.score(&evidence.table).stay_rate;
    let law = p_star / (2.0 * p).max(f64::MIN_POSITIVE);
    let mut figure = format!(
        "p = {p:.3}, p* = {p_star:.3} on unseen tokens over {layers:.0} layers: {law:.2} of vanilla's row bytes by the law"
    );
    let measured = found.benches.iter().find_map(|bench| {
        let bytes = |strategy: &str, placement: &str| {
            let mut rows =
                bench.settings.iter().filter(|s| s.strategy == strategy && s.placement == placement);
            rows.next().map(|s| s.decode_bytes_per_token.dispatch + s.decode_bytes_per_token.combine)
        };
        let vanilla = bytes("vanilla", "round_robin").filter(|bytes| *bytes > 0.0)?;
        Some([bytes("coherent", "round_robin")? / vanilla, bytes("coherent", "affinity")? / vanilla])
    });
    let measured = measured.or_else(|| measured_in_rows(&found.strategies));
    let Some([same, affine]) = measured else {
        figure += "; not measured on the wire: give the JSON of `exflow bench`";
        return CheckFacts { pass: None, ..done("volume law", claim, false, figure) };
    };
    figure += &format!(
        "; measured while decoding: {same:.2} with the same placement, {affine:.2} with affinity (K/V is counted apart)"
    );
    done("volume law", claim, same <= 0.55 && affine <= 1.1 * law.max(0.3) && affine < same, figure)
}

/// Dispatch and combine of coherent over vanilla's with round-robin: with round-robin and with affinity, means over
/// all settings where all three were run.
fn measured_in_rows(rows: &[StrategyFacts]) -> Option<[f64; 2]> {
    let bytes = |row: &StrategyFacts| row.bytes_per_token.dispatch + row.bytes_per_token.combine;
    let mut ratios: Vec<[f64; 2]> = Vec::new();
    for vanilla in top_1(rows).filter(|row| row.strategy == "vanilla" && row.table == "round_robin") {
        let beside = |table: &str| {
            let same = |row: &&StrategyFacts| {
                row.strategy == "coherent" && row.table == table && row.schedule == vanilla.schedule
            };
            rows.iter().filter(same).find(|row| same_setting(row, vanilla)).map(bytes)
        };
        if let (Some(even), Some(affine), true) =
            (beside("round_robin"), beside("affinity"), bytes(vanilla) > 0.0)
        {
            ratios.push([even / bytes(vanilla), affine / bytes(vanilla)]);
        }
    }
    let mean = |at: usize| ratios.iter().map(|ratio| ratio[at]).sum::<f64>() / ratios.len() as f64;
    (!ratios.is_empty()).then(|| [mean(0), mean(1)])
}

/// What the paper claims of tokens that take one expert.
fn top_1(rows: &[StrategyFacts]) -> impl Iterator<Item = &StrategyFacts> {
    rows.iter().filter(|row| row.top_k <= 1)
}

fn same_setting(a: &StrategyFacts, b: &StrategyFacts) -> bool {
    (&a.model, a.ranks, a.sequences, &a.link) == (&b.model, b.ranks, b.sequences, &b.link)
}

/// Time in exchanges, replayed.
pub(super) fn latency(evidence: &Evidence<'_>) -> CheckFacts {
    let (name, claim) = ("latency of the exchange", "up to 67 % less time in routing between GPUs");
    let Some(trace) = &evidence.replayed else {
        return open(name, claim, "give a trace of 1,024 tokens or more, to be replayed");
    };
    let topology = evidence.topology().or_linked(LINK);
    let run = |table, strategy| -> Option<Simulation> {
        let options =
            SimulateOptions { strategy, batch: 8, row_bytes: 4096.0, kv_bytes: 2048.0, combine_sum: false };
        simulate(table, trace, &topology, &options).ok()
    };
    let even = evidence.round_robin(evidence.options.ranks);
    let runs = (run(&even, Strategy::Vanilla), run(&evidence.table, Strategy::Coherent));
    let (Some(vanilla), Some(coherent)) = runs else {
        return open(name, claim, "the trace cannot be replayed over these ranks");
    };
    let less =
        |a: Option<f64>, b: Option<f64>| 1.0 - a.unwrap_or(0.0) / b.unwrap_or(1.0).max(f64::MIN_POSITIVE);
    let (rounds, flow) =
        (less(coherent.rounds_ms, vanilla.rounds_ms), less(coherent.flow_ms, vanilla.rounds_ms));
    let figure = format!(
        "routes of {} unseen tokens replayed over links of 2 ms, 8 at once, coherent with affinity against vanilla in rounds \
         with round-robin: {:.0} % less in rounds ({:.1} of {:.1} ms a token), {:.0} % less without barriers ({:.1} ms)",
        coherent.tokens,
        100.0 * rounds,
        coherent.rounds_ms.unwrap_or(0.0),
        vanilla.rounds_ms.unwrap_or(0.0),
        100.0 * flow,
        coherent.flow_ms.unwrap_or(0.0)
    );
    done(name, claim, flow >= 0.67, figure)
}

/// Tokens a second against what DeepSpeed-MoE does.
pub(super) fn throughput(found: &Gathered) -> CheckFacts {
    let (name, claim) = ("throughput", "up to 2.2 times the tokens a second of DeepSpeed-MoE");
    let mut best: Option<(f64, &StrategyFacts)> = None;
    let mut parts: Vec<(String, f64)> = Vec::new();
    let baselines = found.strategies.iter().filter(|row| {
        (row.strategy.as_str(), row.schedule.as_str(), row.table.as_str())
            == ("vanilla", "rounds", "round_robin")
            && row.tokens_per_s > 0.0
    });
    for base in baselines {
        let ours =
            found.strategies.iter().filter(|row| row.strategy == "coherent" && same_setting(row, base));
        let Some(fastest) = ours.max_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s)) else { continue };
        let factor = fastest.tokens_per_s / base.tokens_per_s;
        parts.push((format!("{} × {} on {}", base.ranks, base.sequences, base.link), factor));
        if best.is_none_or(|(most, _)| factor > most) {
            best = Some((factor, fastest));
        }
    }
    let Some((factor, row)) = best else {
        return open(name, claim, "give the JSON of `exflow bench strategies`");
    };
    let list: Vec<String> = parts.iter().map(|(name, factor)| format!("{name}: {factor:.2}")).collect();
    let figure = format!(
        "best {factor:.2} times ({} · {}, {} ranks, {} sequences, {}); ranks × sequences on link: {}",
        row.schedule,
        row.table,
        row.ranks,
        row.sequences,
        row.link,
        list.join(", ")
    );
    CheckFacts { values: parts, ..done(name, claim, factor >= 2.2, figure) }
}

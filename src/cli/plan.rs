//! `exflow plan`: what each strategy, schedule and table will do on these ranks and links, before any of them runs; and
//! `--strategy auto`, which runs the best.

use super::failure::Failure;
use super::flags::{RankFlags, check_out};
use super::output::{self, Format};
use exflow::engine::plan::Prediction;
use exflow::engine::{Cluster, RunStats, Schedule};
use exflow::placement::{PlacementTable, SolveOptions};
use exflow::progress::Bars;
use exflow::study::{self, Candidate, Planned, Planner, Ranked};
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Measures links and kernels, predicts every strategy, schedule and table, and picks
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Links are pinged, each rank times its own kernels, and the model writes a little text whose routes are\n\
                        replayed for every setting; each strategy and schedule decodes a dozen tokens on trial with one table,\n\
                        which says how much longer the ranks take while everything is at work at once. docs/METHODOLOGY.md has the formulas. `--strategy auto` of generate and\n\
                        serve does the same and runs the best.\n\n\
                        Example:\n  exflow plan -m examples/models/gpt-moe-16e --ep-size 4 --transport quic --link wan --check 24"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Sequences at once
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8], value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    sequences: Vec<usize>,
    /// Runs the best setting afterwards with N tokens for each sequence, and prints prediction beside measurement
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(4..=4096))]
    check: Option<usize>,
    /// Time for the solver of the affinity table
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = super::flags::duration)]
    time_limit: Duration,
    /// Seed of the model's own text and of the solver
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Writes what was measured as a topology for `exflow place`
    #[arg(long, value_name = "FILE")]
    topology_out: Option<PathBuf>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if let Some(path) = &args.topology_out {
        check_out(path)?;
    }
    let bars = Bars::terminal_only();
    let Some(mut options) = args.ranks.led(&bars)? else { return Ok(()) };
    options.schedule = Schedule::Rounds;
    let mut cluster = Cluster::start(options, &bars)?;
    if cluster.options().ranks < 2 {
        return Err(Failure::Input("one rank leaves nothing to plan; give --ep-size 2 or more".into()));
    }
    let mut planner = Planner::of_own_text(&mut cluster, args.seed, &bars)?;
    if let Some(path) = &args.topology_out {
        std::fs::write(path, planner.topology(&hosts(&cluster)))
            .map_err(|e| Failure::Run(format!("{}: {e}", path.display())))?;
    }
    let solve = SolveOptions { seed: args.seed, time_limit: args.time_limit, ..SolveOptions::default() };
    let tables = tables(&cluster, &planner, &solve)?;
    let candidates = study::candidates(&tables, &[Schedule::Rounds, Schedule::Flow]);
    for &sequences in &args.sequences {
        planner.try_out(&mut cluster, &study::ways(&candidates), sequences)?;
    }
    let mut plans = Vec::new();
    for &sequences in &args.sequences {
        let ranked = planner.choose(&mut cluster, &candidates, sequences)?;
        let measured = match (args.check, ranked.first()) {
            (Some(tokens), Some(best)) => {
                Some(check(&mut cluster, &best.candidate, sequences, tokens, args.seed)?)
            }
            _ => None,
        };
        plans.push((sequences, ranked, measured));
    }
    match args.format {
        Format::Json => output::json(&as_json(&planner, &plans)),
        Format::Text => output::text(&as_text(&planner, &plans)),
    }
}

type Plan = (usize, Vec<Ranked>, Option<f64>);

/// The table that was asked for, one solved on the planned text, and the layer split, where each rank has the memory.
fn tables(
    cluster: &Cluster,
    planner: &Planner,
    solve: &SolveOptions,
) -> Result<Vec<(String, PlacementTable)>, Failure> {
    let (spec, ranks) = (cluster.spec(), cluster.options().ranks);
    let mut tables = vec![(cluster.options().placement.to_string(), cluster.placement().clone())];
    let mut affinity = study::planned_table(planner, spec.experts, solve)?;
    affinity.model_digest = Some(spec.digest.clone());
    tables.push(("affinity".into(), affinity));
    if spec.moe_layers() >= ranks {
        let mut layers = study::layer_split(spec.moe_layers(), spec.experts, ranks)?;
        layers.model_digest = Some(spec.digest.clone());
        tables.push(("layers".into(), layers));
    }
    Ok(tables)
}

/// Ranks of other processes, or behind shaped links, count as hosts of their own.
fn hosts(cluster: &Cluster) -> Vec<String> {
    let apart = cluster.options().group.is_some() || cluster.options().link.is_some();
    let name = |rank: usize| if apart { format!("host{rank}") } else { "localhost".into() };
    (0..cluster.options().ranks).map(name).collect()
}

/// Tokens per second of `best` while all sequences decode.
fn check(
    cluster: &mut Cluster,
    best: &Candidate,
    sequences: usize,
    tokens: usize,
    seed: u64,
) -> Result<f64, Failure> {
    best.apply(cluster)?;
    let prompts = study::grid_prompts(&cluster.options().model.clone(), sequences, seed)?;
    cluster.generate(&study::requests(&prompts, 4), &mut |_| {})?;
    Ok(study::decode_rate(cluster, &study::requests(&prompts, tokens))?)
}

fn planned(sequences: usize, Ranked { candidate, prediction, tried, expected }: &Ranked) -> Planned {
    Planned {
        sequences,
        strategy: candidate.strategy.to_string(),
        schedule: candidate.schedule.to_string(),
        table: candidate.table.clone(),
        prediction: *prediction,
        tried_tokens_per_s: *tried,
        expected_tokens_per_s: *expected,
    }
}

fn as_json(planner: &Planner, plans: &[Plan]) -> serde_json::Value {
    let of = |(sequences, ranked, measured): &Plan| {
        let settings: Vec<Planned> = ranked.iter().map(|one| planned(*sequences, one)).collect();
        json!({
            "sequences": sequences,
            "choice": settings.first(),
            "why": ranked.first().map(|best| why(best, ranked)),
            "measured_tokens_per_s": measured,
            "settings": settings,
        })
    };
    json!({ "measurements": planner.measured, "plans": plans.iter().map(of).collect::<Vec<_>>() })
}

fn as_text(planner: &Planner, plans: &[Plan]) -> String {
    let mut text = measurements(planner);
    for (sequences, ranked, measured) in plans {
        let _ = writeln!(
            text,
            "\n{sequences} sequence{}\n  {:<34}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}{:>9}{:>11}",
            if *sequences == 1 { "" } else { "s" },
            "setting",
            "tokens/s",
            "on trial",
            "ms/token",
            "compute",
            "travel",
            "queue",
            "context",
            "bytes/token"
        );
        for Ranked { candidate, prediction: p, tried, .. } in ranked {
            let bytes = p.dispatch_bytes + p.combine_bytes + p.kv_bytes;
            let _ = writeln!(
                text,
                "  {:<34}{:>10.1}{:>10}{:>10.2}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>11.0}",
                candidate.to_string(),
                p.tokens_per_s,
                tried.map_or_else(|| "-".into(), |rate| format!("{rate:.1}")),
                p.ms_per_token,
                p.parts.compute_ms,
                p.parts.travel_ms,
                p.parts.queue_ms,
                p.parts.context_ms,
                bytes
            );
        }
        if let Some(best) = ranked.first() {
            let _ = writeln!(text, "  -> {}", why(best, ranked));
            if let Some(measured) = measured {
                let _ = writeln!(text, "  measured: {}", beside(best.prediction.tokens_per_s, *measured));
            }
        }
    }
    text
}

fn measurements(planner: &Planner) -> String {
    let measured = &planner.measured;
    let pairs = || {
        let rows = measured.links.iter().enumerate();
        rows.flat_map(|(from, row)| row.iter().enumerate().filter(move |(to, _)| *to != from).map(|(_, l)| l))
    };
    let range = |of: &dyn Fn(&exflow::engine::plan::LinkTime) -> f64| {
        pairs().map(of).fold((f64::INFINITY, 0.0_f64), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (low, high) = range(&|link| 1e3 * link.latency_s);
    let (slow, fast) = range(&|link| 8e-6 * link.bytes_per_s);
    let mut text = format!(
        "links: {low:.3} to {high:.3} ms one way, {slow:.0} to {fast:.0} Mbit/s; an exchange of all ranks {:.3} ms\n",
        1e3 * measured.exchange_s
    );
    for (rank, times) in measured.ranks.iter().enumerate() {
        let hop = &times.hop.coherent;
        let _ = writeln!(
            text,
            "rank {rank}: a layer takes {:.2} ms for 1 row, {:.2} ms for 16; {:.2} times longer while all work; {:.2} ms longer after \
             a rest of 3 ms",
            1e3 * hop.at(1),
            1e3 * hop.at(16),
            times.crowded,
            1e3 * times.waking.after(3e-3)
        );
    }
    for load in &measured.loads {
        let _ = writeln!(
            text,
            "trial, {} at once: {} in {} made {:.1} tokens/s; the ranks took {:.2} times as long as alone, messages {:.2} ms \
             longer",
            load.sequences,
            load.strategy,
            load.schedule,
            load.tokens_per_s,
            load.factor,
            1e3 * load.delay_s
        );
    }
    text
}

/// The choice, and what the best of each other kind would do.
fn why(best: &Ranked, ranked: &[Ranked]) -> String {
    let Ranked { candidate: best, prediction: p, tried, expected } = best;
    let mut text = format!("{best}: {:.1} tokens/s", p.tokens_per_s);
    if let Some(rate) = tried {
        let _ = write!(text, " ({rate:.1} on trial)");
    }
    let mut others = Vec::new();
    let differs = |what: &str, c: &Candidate| match what {
        "strategy" => c.strategy != best.strategy,
        "schedule" => c.schedule != best.schedule,
        _ => c.table != best.table,
    };
    for what in ["strategy", "schedule", "table"] {
        if let Some(Ranked { candidate: other, expected: of_other, .. }) =
            ranked.iter().find(|one| differs(what, &one.candidate))
        {
            let times = expected / of_other.max(1e-9);
            others.push(format!("{times:.2}x the best of another {what} ({other})"));
        }
    }
    if !others.is_empty() {
        let _ = write!(text, ", {}", others.join(", "));
    }
    let parts = [
        ("computing", p.parts.compute_ms),
        ("travelling", p.parts.travel_ms),
        ("waiting for busy ranks", p.parts.queue_ms),
        ("waiting for keys and values", p.parts.context_ms),
    ];
    if let Some((name, ms)) = parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
        let _ =
            write!(text, "; most of a token's time goes into {name} ({ms:.2} of {:.2} ms)", p.ms_per_token);
    }
    text
}

fn beside(predicted: f64, measured: f64) -> String {
    let off = 100.0 * (predicted / measured.max(1e-9) - 1.0);
    format!("{measured:.1} tokens/s, predicted {predicted:.1} ({off:+.0} %)")
}

/// What `--strategy auto` picked.
pub(crate) struct Chosen {
    sequences: usize,
    pub(crate) prediction: Prediction,
}

impl Chosen {
    /// Prediction beside measurement.
    pub(crate) fn note(&self, stats: &RunStats) {
        let measured = match stats.tpot_ms > 0.0 {
            true => 1e3 * self.sequences as f64 / stats.tpot_ms,
            false => return,
        };
        output::note(&format!("auto: {}", beside(self.prediction.tokens_per_s, measured)));
    }
}

/// Has a cluster that was started with `--strategy auto` run as predicted best for so many sequences; says what and why.
/// `schedule`: the one that was asked for.
pub(crate) fn tune(
    cluster: &mut Cluster,
    sequences: usize,
    schedule: Option<Schedule>,
) -> Result<Option<Chosen>, Failure> {
    if cluster.options().ranks < 2 {
        return Ok(None);
    }
    let mut planner = Planner::of_own_text(cluster, 0, &Bars::terminal_only())?;
    let table = (cluster.options().placement.to_string(), cluster.placement().clone());
    let schedules = schedule.map_or_else(|| vec![Schedule::Rounds, Schedule::Flow], |one| vec![one]);
    let candidates = study::candidates(&[table], &schedules);
    planner.try_out(cluster, &study::ways(&candidates), sequences)?;
    let ranked = planner.choose(cluster, &candidates, sequences)?;
    let Some(best) = ranked.first() else { return Ok(None) };
    output::note(&format!("auto, {sequences} at once: {}", why(best, &ranked)));
    best.candidate.apply(cluster)?;
    Ok(Some(Chosen { sequences, prediction: best.prediction }))
}

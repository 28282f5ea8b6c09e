//! What requests notice of experts that move while they run: the gaps between a sequence's tokens.

use super::StudyError;
use super::grid::{median, quantile};
use exflow_engine::{Cluster, Engine, EngineError, EngineOptions, PlacementTable, Request, Schedule, Tokens};
use serde::Serialize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Gaps at the beginning of a sequence that are left out: prompts of others are prefilled between its first tokens.
const SETTLING: usize = 8;
/// It is looked so often whether a move has ended.
const LOOK: Duration = Duration::from_millis(2);

/// Gaps between two tokens of a sequence, of all sequences and runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gaps {
    /// How many they are.
    pub count: usize,
    /// Milliseconds, the median.
    pub p50_ms: f64,
    /// Milliseconds, of which one in a hundred is longer.
    pub p99_ms: f64,
    /// Milliseconds of a run's longest one, the median over the runs.
    pub longest_ms: f64,
    /// Milliseconds of the longest one of all.
    pub worst_ms: f64,
}

/// Runs with a move and without, interleaved; `docs/METHODOLOGY.md` defines the figures.
#[derive(Debug, Clone, Serialize)]
pub struct MovePauses {
    /// World size.
    pub ranks: usize,
    /// What ranks wait for.
    pub schedule: Schedule,
    /// Sequences that decode at once.
    pub sequences: usize,
    /// Tokens made of each.
    pub tokens: usize,
    /// Runs of either kind.
    pub repeats: usize,
    /// Of runs without a move.
    pub without: Gaps,
    /// Of runs with one.
    pub with: Gaps,
    /// Of these, those that overlap it.
    pub moving: Gaps,
    /// Tokens of all sequences per second, the median over the runs without a move.
    pub tokens_per_s_without: f64,
    /// The same over the runs with one.
    pub tokens_per_s_with: f64,
    /// Milliseconds from asking for a move to its end, the median.
    pub move_ms: f64,
    /// Experts that ranks read, all moves together.
    pub experts: u64,
    /// Tokens told while they read them.
    pub tokens_while_read: u64,
}

/// When a sequence's tokens came, and which.
type Told = Vec<(Instant, u32)>;

/// One run.
struct Run {
    told: Vec<Told>,
    /// From asking for a move to its end.
    moved: Option<(Instant, Instant)>,
}

impl Run {
    /// Gaps of each sequence, seconds, where `wanted` holds of when they begin and end.
    fn gaps(&self, wanted: impl Fn(Instant, Instant) -> bool) -> Vec<f64> {
        let of = |told: &Told| {
            let pairs = told.windows(2).skip(SETTLING).map(|pair| (pair[0].0, pair[1].0));
            pairs.filter(|&(from, to)| wanted(from, to)).map(|(from, to)| (to - from).as_secs_f64()).collect()
        };
        self.told.iter().flat_map(|told| -> Vec<f64> { of(told) }).collect()
    }

    fn tokens_per_s(&self) -> f64 {
        let times = || self.told.iter().flatten().map(|(time, _)| *time);
        let span = times().max().zip(times().min()).map_or(0.0, |(last, first)| (last - first).as_secs_f64());
        if span > 0.0 { times().count() as f64 / span } else { 0.0 }
    }
}

/// Runs `requests` together `repeats` times as they are and as often with experts moving once the fourth part of their tokens
/// is told, to `other` and back in turns. All runs must say the same.
///
/// # Errors
/// What the engine refuses, a move that is refused, runs that differ.
pub fn move_pauses(
    cluster: Cluster,
    other: &PlacementTable,
    requests: &[Request],
    repeats: usize,
) -> Result<MovePauses, StudyError> {
    let (ranks, schedule) = (cluster.options().ranks, cluster.options().schedule);
    let tables = [other.clone(), cluster.placement().clone()];
    let engine = Engine::over(cluster, EngineOptions::default())?;
    // One run with each table, unmeasured: drivers compile on the way.
    let first = run(&engine, requests, Some(&tables[0]))?;
    run(&engine, requests, Some(&tables[1]))?;
    let before = engine.live().moves;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for repeat in 0..repeats {
        let table = &tables[repeat % 2];
        for moves in if repeat % 2 == 0 { [false, true] } else { [true, false] } {
            let run = run(&engine, requests, moves.then_some(table))?;
            same(&first, &run, if moves { "with a move" } else { "without a move" }, repeat)?;
            if moves { with.push(run) } else { without.push(run) }
        }
    }
    let moves = engine.live().moves;
    engine.finish();
    let rates = |runs: &[Run]| median(&mut runs.iter().map(Run::tokens_per_s).collect::<Vec<_>>());
    let mut seconds: Vec<f64> =
        with.iter().filter_map(|run| run.moved).map(|(from, to)| (to - from).as_secs_f64()).collect();
    Ok(MovePauses {
        ranks,
        schedule,
        sequences: requests.len(),
        tokens: requests.iter().map(|request| request.max_tokens).max().unwrap_or(0),
        repeats,
        without: gaps(without.iter().map(|run| run.gaps(|_, _| true))),
        with: gaps(with.iter().map(|run| run.gaps(|_, _| true))),
        moving: gaps(with.iter().map(|run| {
            run.gaps(|from, to| run.moved.is_some_and(|(asked, ended)| from < ended && to > asked))
        })),
        tokens_per_s_without: rates(&without),
        tokens_per_s_with: rates(&with),
        move_ms: 1e3 * quantile(&mut seconds, 0.5),
        experts: moves.experts - before.experts,
        tokens_while_read: moves.tokens - before.tokens,
    })
}

fn gaps(runs: impl Iterator<Item = Vec<f64>>) -> Gaps {
    let (mut all, mut longest) = (Vec::new(), Vec::new());
    for gaps in runs {
        longest.push(gaps.iter().copied().fold(0.0, f64::max));
        all.extend(gaps);
    }
    Gaps {
        count: all.len(),
        p50_ms: 1e3 * quantile(&mut all, 0.5),
        p99_ms: 1e3 * quantile(&mut all, 0.99),
        longest_ms: 1e3 * quantile(&mut longest, 0.5),
        worst_ms: 1e3 * longest.iter().copied().fold(0.0, f64::max),
    }
}

/// All requests to their end, and a move on the way.
fn run(engine: &Engine, requests: &[Request], table: Option<&PlacementTable>) -> Result<Run, StudyError> {
    let begin = requests.iter().map(|request| request.max_tokens).sum::<usize>() / 4;
    let running =
        requests.iter().map(|request| engine.submit(request.clone())).collect::<Result<Vec<_>, _>>()?;
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let count = &count;
        let readers: Vec<_> =
            running.into_iter().map(|tokens| scope.spawn(move || read(tokens, count))).collect();
        let moved = table.map(|table| {
            while count.load(Ordering::Relaxed) < begin && engine.ended().is_none() {
                std::thread::sleep(LOOK);
            }
            move_to(engine, table)
        });
        let told = readers.into_iter().map(|reader| match reader.join() {
            Ok(told) => told,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        let told = told.collect::<Result<Vec<_>, _>>()?;
        Ok(Run { told, moved: moved.transpose()? })
    })
}

fn read(tokens: Tokens, count: &AtomicUsize) -> Result<Told, EngineError> {
    let note = |event: Result<exflow_engine::TokenEvent, EngineError>| {
        let token = event?.token;
        count.fetch_add(1, Ordering::Relaxed);
        Ok((Instant::now(), token))
    };
    tokens.map(note).collect()
}

/// Has experts move, and waits until they have.
fn move_to(engine: &Engine, table: &PlacementTable) -> Result<(Instant, Instant), StudyError> {
    let before = engine.live().moves;
    let asked = Instant::now();
    engine.move_to(table.clone())?;
    loop {
        let now = engine.live().moves;
        if now.refused > before.refused {
            return Err(StudyError::Refused { why: now.why.unwrap_or_default() });
        }
        if let Some(cause) = engine.ended() {
            return Err(EngineError::Stopped { cause }.into());
        }
        if now.done > before.done {
            return Ok((asked, Instant::now()));
        }
        std::thread::sleep(LOOK);
    }
}

fn same(first: &Run, run: &Run, setting: &str, repeat: usize) -> Result<(), StudyError> {
    for (sequence, (first, told)) in first.told.iter().zip(&run.told).enumerate() {
        let differs = first.iter().zip(told).position(|(first, told)| first.1 != told.1);
        let differs = differs.or((first.len() != told.len()).then_some(first.len().min(told.len())));
        if let Some(token) = differs {
            return Err(StudyError::Differ { setting: setting.to_owned(), run: repeat, sequence, token });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_of_sequences_and_the_longest_of_runs() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let told = |from: u64| (0..12u32).map(|n| (at(from + 10 * u64::from(n)), n)).collect::<Told>();
        let mut late = told(5);
        late[10].0 += Duration::from_millis(8);
        let run = Run { told: vec![told(0), late], moved: Some((at(108), at(109))) };
        let ms = |seconds: &[f64]| seconds.iter().map(|s| (1e3 * s).round() as u64).collect::<Vec<_>>();
        assert_eq!(ms(&run.gaps(|_, _| true)), [10, 10, 10, 10, 18, 2], "the first {SETTLING} are left out");
        let (asked, ended) = run.moved.expect("a move");
        assert_eq!(ms(&run.gaps(|from, to| from < ended && to > asked)), [10, 18]);
        let all = gaps([vec![0.01; 98], vec![0.02, 0.04], vec![0.03; 3]].into_iter());
        assert_eq!(all.count, 103);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(all.p50_ms, 10.0) && near(all.longest_ms, 30.0) && near(all.worst_ms, 40.0), "{all:?}");
        let token = |sequence: &mut Told| sequence[7].1 = 99;
        let mut other = Run { told: vec![told(0), told(5)], moved: None };
        assert!(same(&run, &other, "with a move", 0).is_ok());
        token(&mut other.told[1]);
        let differs = same(&run, &other, "with a move", 3).expect_err("another token");
        assert!(matches!(differs, StudyError::Differ { run: 3, sequence: 1, token: 7, .. }), "{differs}");
    }
}

//! Progress for people: bars on a terminal, plain lines elsewhere, always on stderr.

use exflow_engine::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a stage may run before a plain line says how far it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows every stage that reports: one bar per stage on a terminal; elsewhere one line when a stage ends and
/// one every ten seconds until then.
#[derive(Debug)]
pub struct Bars {
    bars: MultiProgress,
    terminal: bool,
    plain: bool,
    stages: Mutex<HashMap<String, Stage>>,
}

#[derive(Debug)]
struct Stage {
    bar: ProgressBar,
    started: Instant,
    last_line: Instant,
    finished: bool,
    detail: String,
}

impl Bars {
    /// Bars on a terminal, lines elsewhere.
    pub fn new() -> Self {
        Self::with_lines(true)
    }

    /// Bars on a terminal, nothing elsewhere: for commands whose stderr others read.
    pub fn terminal_only() -> Self {
        Self::with_lines(false)
    }

    fn with_lines(plain: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: MultiProgress::with_draw_target(target), terminal, plain, stages: Mutex::default() }
    }

    /// A line of its own beside the bars, never through them.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bars.suspend(|| say(text));
        } else {
            say(text);
        }
    }

    fn stage(&self) -> Stage {
        let now = Instant::now();
        let bar = self.bars.add(ProgressBar::no_length());
        if let Ok(style) = ProgressStyle::with_template("{prefix:<24} {bar:28} {msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        Stage { bar, started: now, last_line: now, finished: false, detail: String::new() }
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bars {
    fn update(&self, stage: &str, done: u64, total: u64, unit: &str) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = stages.entry(stage.to_owned()).or_insert_with(|| self.stage());
        if entry.finished && done < total {
            *entry = self.stage(); // the same stage again, for another cluster or text
        } else if entry.finished {
            return;
        }
        let seconds = entry.started.elapsed().as_secs_f64();
        let mut text = describe(done, total, unit, seconds);
        if !entry.detail.is_empty() {
            text = format!("{text}: {}", entry.detail);
        }
        entry.bar.set_prefix(stage.to_owned());
        entry.bar.set_length(total);
        entry.bar.set_position(done);
        entry.bar.set_message(text.clone());
        entry.finished = done >= total;
        if entry.finished {
            entry.bar.finish();
        }
        let due = entry.finished || entry.last_line.elapsed() >= LINE_EVERY;
        if due && self.plain && !self.terminal {
            entry.last_line = Instant::now();
            say(&format!("{stage}: {text}"));
        }
    }

    fn detail(&self, stage: &str, text: &str) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        stages.entry(stage.to_owned()).or_insert_with(|| self.stage()).detail = text.to_owned();
    }
}

/// `12.3 MB` at the end, `1200 of 4000 tokens, 830 tokens/s` before it.
fn describe(done: u64, total: u64, unit: &str, seconds: f64) -> String {
    let amount = |n: u64| match unit {
        "B" => crate::report::byte_text(n as f64),
        _ if n >= 1_000_000 => format!("{:.2} million {unit}", n as f64 / 1e6),
        _ => format!("{n} {unit}"),
    };
    match (unit, done >= total) {
        ("s", true) => return format!("done in {seconds:.1} s"),
        ("s", false) => return format!("{done} of at most {total} s"),
        (_, true) => return format!("{} in {seconds:.1} s", amount(total)),
        (_, false) => {}
    }
    let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
    format!("{} of {}, {}/s", amount(done), amount(total), amount(rate as u64))
}

/// One line to stderr; a stderr that is closed is nobody's loss.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_carry_their_unit() {
        assert_eq!(describe(500, 2000, "tokens", 2.0), "500 tokens of 2000 tokens, 250 tokens/s");
        assert_eq!(describe(2_833_344, 2_833_344, "elements", 0.5), "2.83 million elements in 0.5 s");
        assert_eq!(describe(3, 10, "s", 3.2), "3 of at most 10 s");
        assert_eq!(describe(2_000_000, 2_000_000, "B", 1.0), "2.00 MB in 1.0 s");
    }

    #[test]
    fn a_stage_may_end_at_once_and_come_again() {
        let bars = Bars::terminal_only();
        for (done, total) in [(0, 0), (0, 5), (5, 5), (5, 5), (0, 5)] {
            bars.update("load", done, total, "B");
        }
    }
}

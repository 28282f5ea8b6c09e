//! Where log lines and traces go: stderr in text or JSON, and a file for Perfetto.

use super::failure::Failure;
use clap::ValueEnum;
use std::io::IsTerminal;
use std::path::PathBuf;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Flags of every verb.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Of every verb")]
pub(crate) struct LogFlags {
    /// Takes flags from a TOML file: keys are the flags' names, [VERB] tables for one verb
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What is logged to stderr
    #[arg(long, global = true, value_name = "off|error|warn|info|debug|trace", default_value = "warn")]
    log: LevelFilter,
    /// How log lines are written
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Writes spans of steps, layers and exchanges in Chrome's trace format, for ui.perfetto.dev
    #[arg(long, global = true, value_name = "FILE")]
    trace_out: Option<PathBuf>,
}

/// Keeps the trace file open; it is complete once this is dropped.
pub(crate) struct Logging(
    #[allow(dead_code, reason = "held for what its drop does")] Option<tracing_chrome::FlushGuard>,
);

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

/// Sets up what the flags ask for. Call it once, after the process was prepared: the trace has a thread of its own.
pub(crate) fn start(flags: &LogFlags) -> Result<Logging, Failure> {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines: Boxed = match flags.log_format {
        LogFormat::Text => {
            lines.with_ansi(std::io::stderr().is_terminal()).with_filter(targets(flags.log)).boxed()
        }
        LogFormat::Json => lines.json().with_filter(targets(flags.log)).boxed(),
    };
    let mut layers = vec![lines];
    let mut guard = None;
    if let Some(path) = &flags.trace_out {
        let file = std::fs::File::create(path).map_err(|e| {
            Failure::Input(format!("{}: cannot be written: {e}; choose a folder that exists", path.display()))
        })?;
        let (chrome, flush) =
            tracing_chrome::ChromeLayerBuilder::new().writer(file).include_args(true).build();
        layers.push(chrome.with_filter(targets(LevelFilter::TRACE)).boxed());
        guard = Some(flush);
    }
    tracing_subscriber::registry().with(layers).init();
    Ok(Logging(guard))
}

/// Our own crates at `level`; the complaints of others from `info` on: drivers' loaders say much that hurts nobody.
fn targets(level: LevelFilter) -> Targets {
    let others = if level >= LevelFilter::INFO { LevelFilter::WARN } else { LevelFilter::OFF };
    Targets::new().with_default(others).with_target("exflow", level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::filter::LevelFilter as Level;

    #[test]
    fn other_crates_are_heard_only_by_those_who_listen() {
        let shown = |level, target| targets(level).would_enable(target, &tracing::Level::ERROR);
        assert!(shown(Level::WARN, "exflow_engine::service") && !shown(Level::WARN, "wgpu_hal::vulkan"));
        assert!(shown(Level::INFO, "wgpu_hal::vulkan") && !shown(Level::OFF, "exflow"));
    }
}

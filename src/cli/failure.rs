//! What ends a command early, and how it is told: at most four lines on stderr and an exit code.

use clap::error::ErrorKind;
use exflow::engine::EngineError;
use exflow::placement::{AffinityError, SolveError, TableError, TopologyError, TraceError};
use exflow::study::{GatherError, ReplayError};
use exflow::transport::TransportError;
use std::io::{self, Write};
use std::process::ExitCode;

/// Most lines that an error may take on stderr.
const MOST_LINES: usize = 4;

/// Why a command ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Bad usage or bad input: exit code 2.
    Input(String),
    /// Something failed at run time: exit code 1.
    Run(String),
    /// Whoever read our output has enough: a success.
    BrokenPipe,
}

impl Failure {
    /// Writes the message and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        let (text, code) = match self {
            Self::Input(text) => (text, 2),
            Self::Run(text) => (text, 1),
            Self::BrokenPipe => return ExitCode::SUCCESS,
        };
        let mut stderr = io::stderr().lock();
        for line in short(&format!("error: {text}")) {
            let _ = writeln!(stderr, "{line}");
        }
        ExitCode::from(code)
    }
}

/// Help and version go to stdout and succeed; wrong usage is shortened to what fits.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => Failure::from(error).report(),
        };
    }
    let text = match error.kind() {
        // clap would print the whole help here.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "error: no verb; try 'exflow --help'".to_owned()
        }
        _ => error.render().to_string(),
    };
    let mut stderr = io::stderr().lock();
    for line in short(&text) {
        let _ = writeln!(stderr, "{line}");
    }
    ExitCode::from(2)
}

/// The lines that say something, at most four, the last one kept: it tells where to look further.
fn short(text: &str) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    match lines.as_slice() {
        [first @ .., last] if lines.len() > MOST_LINES => {
            first[..MOST_LINES - 1].iter().copied().chain([*last]).collect()
        }
        _ => lines,
    }
}

impl From<io::Error> for Failure {
    /// Of writing results; files that are read name themselves where they are read.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Run(format!("cannot write the result: {error}")),
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        if error.is_input() { Self::Input(error.to_string()) } else { Self::Run(error.to_string()) }
    }
}

impl From<exflow::hub::HubError> for Failure {
    fn from(error: exflow::hub::HubError) -> Self {
        if error.is_input() { Self::Input(error.to_string()) } else { Self::Run(error.to_string()) }
    }
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Options { .. } | TransportError::Identity { .. } => {
                Self::Input(error.to_string())
            }
            error => Self::Run(error.to_string()),
        }
    }
}

impl From<exflow::study::StudyError> for Failure {
    fn from(error: exflow::study::StudyError) -> Self {
        if error.is_input() { Self::Input(error.to_string()) } else { Self::Run(error.to_string()) }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        match error.io_error_kind() {
            Some(io::ErrorKind::BrokenPipe) => Self::BrokenPipe,
            _ => Self::Run(format!("cannot write the result: {error}")),
        }
    }
}

/// Errors that can only come from what the user gave.
macro_rules! input_errors {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Input(error.to_string())
            }
        }
    )*};
}

input_errors!(AffinityError, GatherError, ReplayError, SolveError, TableError, TopologyError, TraceError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_keep_their_start_and_their_end() {
        assert_eq!(short("a\n\nb\n"), ["a", "b"]);
        assert_eq!(short("a\nb\nc\nd\ne\nf"), ["a", "b", "c", "f"]);
        assert!(short("\n \n").is_empty());
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let closed = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::from(closed), Failure::BrokenPipe));
    }
}

//! Results on stdout, everything else on stderr.

use super::failure::Failure;
use clap::ValueEnum;
use serde::Serialize;
use std::io::{self, Write};

/// How a result is written: for people, or as one JSON document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

/// How a table is written: for people, as one JSON document, or in Markdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TableFormat {
    Text,
    Json,
    Md,
}

/// One JSON document and a line break.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value)?;
    writeln!(stdout)?;
    Ok(stdout.flush()?)
}

/// One JSON document on a line of its own, for a program that reads while others are to come.
pub(crate) fn json_line<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, value)?;
    writeln!(stdout)?;
    Ok(stdout.flush()?)
}

/// Text as it is.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// A remark on stderr; a stderr that is closed is nobody's loss.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

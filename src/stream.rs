//! Text as it appears: one sequence as it is, several as whole lines marked with their sequence's number.

use std::io::{self, Write};

/// Longest line of marked text, in characters; the break is made at a space where there is one.
const WIDTH: usize = 76;

/// Writes the pieces of one or several growing texts to one output, each flushed as soon as it may be seen.
#[derive(Debug)]
pub struct TextStream<W: Write> {
    out: W,
    pending: Vec<String>,
    ended: Vec<bool>,
}

impl<W: Write> TextStream<W> {
    /// For `sequences` texts at once.
    pub fn new(out: W, sequences: usize) -> Self {
        Self { out, pending: vec![String::new(); sequences], ended: vec![false; sequences] }
    }

    /// More text of one sequence; `last` where it ends.
    pub fn push(&mut self, sequence: usize, text: &str, last: bool) -> io::Result<()> {
        if self.pending.len() == 1 {
            return self.push_single(text, last);
        }
        let Some(pending) = self.pending.get_mut(sequence) else { return Ok(()) };
        pending.push_str(text);
        while let Some(line) = take_line(pending) {
            writeln!(self.out, "[{sequence}] {line}")?;
        }
        if last && !self.ended[sequence] {
            self.ended[sequence] = true;
            let rest = std::mem::take(&mut self.pending[sequence]);
            writeln!(self.out, "[{sequence}] {}", rest.trim_end())?;
        }
        self.out.flush()
    }

    fn push_single(&mut self, text: &str, last: bool) -> io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        if last && !self.ended[0] {
            self.ended[0] = true;
            writeln!(self.out)?;
        }
        self.out.flush()
    }
}

/// The next whole line of `text`, taken off its front: up to a line break, or as much as fits a line.
fn take_line(text: &mut String) -> Option<String> {
    let limit = text.char_indices().nth(WIDTH).map(|(at, _)| at);
    if let Some(at) = text.find('\n').filter(|&at| limit.is_none_or(|limit| at <= limit)) {
        let line = text[..at].to_owned();
        text.drain(..=at);
        return Some(line);
    }
    let limit = limit?;
    let (line, skip) = match text[..limit].rfind(' ') {
        Some(space) if space > 0 => (space, 1),
        _ => (limit, 0),
    };
    let taken = text[..line].to_owned();
    text.drain(..line + skip);
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(sequences: usize, pushes: &[(usize, &str, bool)]) -> String {
        let mut out = Vec::new();
        let mut stream = TextStream::new(&mut out, sequences);
        for &(sequence, text, last) in pushes {
            stream.push(sequence, text, last).expect("writing to memory");
        }
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn one_sequence_is_as_it_is() {
        assert_eq!(written(1, &[(0, "In the", false), (0, " be\nginning", true)]), "In the be\nginning\n");
    }

    #[test]
    fn several_come_in_whole_marked_lines() {
        let text = written(2, &[(0, "a", false), (1, "x\ny", false), (0, "b", true), (1, "", true)]);
        assert_eq!(text, "[1] x\n[0] ab\n[1] y\n");
    }

    #[test]
    fn long_lines_break_at_a_space_and_lose_no_letter() {
        let words = "word ".repeat(40);
        let text = written(2, &[(0, &words, true), (1, &"é".repeat(100), true)]);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH + 4), "{text}");
        assert_eq!(text.matches("word").count(), 40);
        assert_eq!(text.matches('é').count(), 100);
    }
}

//! A request's output as it grows: ids to text, held back where a stop text may begin.

use crate::runtime::FinishReason;
use crate::text::TextStream;
use crate::{EngineError, TextCodec};

/// What one request has put out so far.
#[derive(Default)]
pub(crate) struct Output {
    /// Tokens made, end of text not included.
    pub(crate) ids: Vec<u32>,
    stream: TextStream,
    /// Everything that became readable.
    read: String,
    /// What of it was shown.
    pub(crate) text: String,
    /// Seconds from the start to the first token.
    pub(crate) first: Option<f64>,
    /// Seconds from the start to the newest token.
    pub(crate) last: f64,
    /// Why it ended, where it did: the model's reason, or a stop text.
    pub(crate) finish: Option<FinishReason>,
}

impl Output {
    /// Takes in a token that came after `now` seconds; returns the text that became readable.
    pub(crate) fn push(
        &mut self,
        codec: Option<&TextCodec>,
        stop: &[String],
        token: u32,
        finish: Option<FinishReason>,
        now: f64,
    ) -> Result<String, EngineError> {
        self.first.get_or_insert(now);
        self.last = now;
        self.finish = finish;
        let mut fresh = String::new();
        if finish != Some(FinishReason::Stop) {
            self.ids.push(token);
        }
        if let Some(codec) = codec {
            if finish != Some(FinishReason::Stop) {
                fresh = self.stream.push(codec, token)?;
            }
            if finish.is_some() {
                fresh += &self.stream.finish(codec)?;
            }
        }
        self.read += &fresh;
        Ok(self.show(stop))
    }

    /// Shows what cannot be the beginning of a stop text any more; ends the sequence where one is whole.
    fn show(&mut self, stop: &[String]) -> String {
        let found = stop.iter().filter_map(|s| self.read[self.text.len()..].find(s.as_str())).min();
        let shown = self.text.len();
        let end = match found {
            Some(at) => {
                self.finish = Some(FinishReason::Stop);
                shown + at
            }
            None if self.finish.is_some() => self.read.len(),
            None => {
                let held = |s: &String| {
                    (1..s.len()).rev().find(|&n| s.is_char_boundary(n) && self.read.ends_with(&s[..n]))
                };
                self.read.len() - stop.iter().filter_map(held).max().unwrap_or(0)
            }
        };
        let fresh = self.read[shown..end.max(shown)].to_owned();
        self.text += &fresh;
        fresh
    }
}

//! Text to token ids and back.

use crate::EngineError;
use std::cell::Cell;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Once;
use tokenizers::Tokenizer;

/// No published tokenizer comes near it; a larger file is not read.
const MAX_BYTES: u64 = 64 << 20;

/// A model's tokenizer.
pub struct TextCodec {
    path: PathBuf,
    tokenizer: Tokenizer,
}

impl TextCodec {
    /// Reads `folder/tokenizer.json`; none of its ids may lie outside a vocabulary of `vocab_size`.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self, EngineError> {
        let path = folder.join("tokenizer.json");
        let again = "copy the model anew";
        match std::fs::metadata(&path) {
            Ok(data) if data.is_file() && data.len() <= MAX_BYTES => {}
            Ok(data) if data.is_file() => {
                return Err(EngineError::file(&path, format!("{} bytes, too large", data.len()), again));
            }
            _ => {
                let remedy = "put the model's tokenizer.json there, or give --prompt-ids";
                return Err(EngineError::file(&path, "missing", remedy));
            }
        }
        let bytes = std::fs::read(&path)
            .map_err(|e| EngineError::file(&path, format!("cannot be read: {e}"), again))?;
        Self::parse(path, &bytes, vocab_size)
    }

    /// Reads the content of a tokenizer.json, checked as [`TextCodec::open`] does; `path` is what errors name.
    pub fn parse(path: PathBuf, bytes: &[u8], vocab_size: usize) -> Result<Self, EngineError> {
        let tokenizer = quietly(|| Tokenizer::from_bytes(bytes))
            .map_err(|e| EngineError::file(&path, format!("not a tokenizer: {e}"), "copy the model anew"))?;
        let codec = Self { path, tokenizer };
        // Ids of tokens, and those that the tokenizer puts around every text.
        let around = codec.encode("a")?;
        let known = codec.tokenizer.get_vocab(true).into_values();
        let largest = known.chain(around).max().unwrap_or(0);
        if largest as usize >= vocab_size {
            let what = format!("has token id {largest}, config.json's vocab_size is {vocab_size}");
            return Err(EngineError::file(&codec.path, what, "use the tokenizer that belongs to the model"));
        }
        Ok(codec)
    }

    /// The token ids of `text`, with the special tokens that the tokenizer puts around it (a first token, as a rule).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        self.ids(text, true)
    }

    /// The token ids of a text that holds its special tokens itself, as a chat template writes it.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>, EngineError> {
        let encoding = quietly(|| self.tokenizer.encode(text, special)).map_err(|e| self.failed(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        quietly(|| self.tokenizer.decode(ids, true)).map_err(|e| self.failed(e))
    }

    fn failed(&self, error: String) -> EngineError {
        EngineError::file(&self.path, format!("cannot convert: {error}"), "copy the model anew")
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of the tokenizers library, which panics on some files (a malformed `precompiled_charsmap`, for one), so
/// that it fails in words.
fn quietly<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = std::panic::catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    match result {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizers library gave up on it".to_owned()),
    }
}

/// Turns a growing list of ids into text, holding back what is not a whole character yet.
///
/// What was shown stays shown: the texts of all calls together are the text of all ids, but where bytes that are no
/// UTF-8 follow bytes that are, which some decoders take back once they see them.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// The last ids that were shown, for decoders that look at what stands before, then those that were not.
    window: Vec<u32>,
    /// How many of them were shown whole.
    whole: usize,
    /// What of the window's text was shown.
    shown: String,
}

/// How a decoder writes bytes that are no character, or not yet.
const BROKEN: char = '\u{fffd}';
/// A character has at most four bytes, three of which can wait for the last.
const MOST_PENDING: usize = 3;
/// Tokens held back at most: no character takes as many, so what is still broken then stays so.
const MOST_HELD: usize = 16;

impl TextStream {
    /// Adds a token; returns the text that became readable, perhaps none.
    pub fn push(&mut self, codec: &TextCodec, id: u32) -> Result<String, EngineError> {
        self.window.push(id);
        let text = codec.decode(&self.window)?;
        let held = self.window.len() - self.whole > MOST_HELD;
        if !text.ends_with(BROKEN) || held {
            return self.settle(codec, &text);
        }
        // Bytes are still to come; what stands before them is final, unless it is broken itself.
        let pending = text.chars().rev().take(MOST_PENDING).take_while(|c| *c == BROKEN).count();
        let ready = text.len() - pending * BROKEN.len_utf8();
        match text[..ready].strip_prefix(&*self.shown) {
            Some(fresh) if !fresh.is_empty() && !fresh.contains(BROKEN) => {
                let fresh = fresh.to_owned();
                self.shown += &fresh;
                Ok(fresh)
            }
            _ => Ok(String::new()),
        }
    }

    /// What was held back, once no more tokens come.
    pub fn finish(&mut self, codec: &TextCodec) -> Result<String, EngineError> {
        let text = codec.decode(&self.window)?;
        self.settle(codec, &text)
    }

    /// Shows the window's whole `text`; the ids that became readable are what the next window begins with.
    fn settle(&mut self, codec: &TextCodec, text: &str) -> Result<String, EngineError> {
        let fresh = match text.strip_prefix(&*self.shown) {
            Some(fresh) => fresh.to_owned(),
            // The decoder took back what it had made of these bytes: go on behind as many characters.
            None => text.chars().skip(self.shown.chars().count()).collect(),
        };
        // Without readable text behind it, a window would begin in the middle of something.
        if !fresh.is_empty() {
            self.window.drain(..self.whole);
            self.whole = self.window.len();
            self.shown = codec.decode(&self.window)?;
        }
        Ok(fresh)
    }
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;

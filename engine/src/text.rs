//! Text to token ids and back.

use crate::EngineError;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// A model's tokenizer.
pub struct TextCodec {
    path: PathBuf,
    tokenizer: Tokenizer,
}

impl TextCodec {
    /// Reads `folder/tokenizer.json`; none of its ids may lie outside a vocabulary of `vocab_size`.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self, EngineError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let remedy = "put the model's tokenizer.json there, or give --prompt-ids";
            return Err(EngineError::file(&path, "missing", remedy));
        }
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| EngineError::file(&path, format!("not a tokenizer: {e}"), "copy the model anew"))?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= vocab_size {
            let what = format!("has token id {largest}, config.json's vocab_size is {vocab_size}");
            return Err(EngineError::file(&path, what, "use the tokenizer that belongs to the model"));
        }
        Ok(Self { path, tokenizer })
    }

    /// The token ids of `text`, with the special tokens that the tokenizer puts around it (a first token, as a rule).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| self.failed(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of a text that holds its special tokens itself, as a chat template writes it.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| self.failed(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        self.tokenizer.decode(ids, true).map_err(|e| self.failed(e))
    }

    fn failed(&self, error: tokenizers::Error) -> EngineError {
        EngineError::file(&self.path, format!("cannot convert: {error}"), "copy the model anew")
    }
}

/// Turns a growing list of ids into text, holding back what is not a whole character yet.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    ids: Vec<u32>,
    prefix: usize,
    shown: usize,
}

impl TextStream {
    /// Adds a token; returns the text that became readable, perhaps none.
    pub fn push(&mut self, codec: &TextCodec, id: u32) -> Result<String, EngineError> {
        self.ids.push(id);
        let before = codec.decode(&self.ids[self.prefix..self.shown])?;
        let after = codec.decode(&self.ids[self.prefix..])?;
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let fresh = after.get(before.len()..).unwrap_or_default().to_owned();
        self.prefix = self.shown;
        self.shown = self.ids.len();
        Ok(fresh)
    }

    /// What was held back, once no more tokens come.
    pub fn finish(&mut self, codec: &TextCodec) -> Result<String, EngineError> {
        let before = codec.decode(&self.ids[self.prefix..self.shown])?;
        let after = codec.decode(&self.ids[self.prefix..])?;
        self.prefix = self.ids.len();
        self.shown = self.ids.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}

//! Log-probabilities in OpenAI's two forms.

use super::respond::Kind;
use crate::engine::{TextCodec, TokenEvent};
use serde_json::{Map, Value, json};

/// The log-probabilities of a choice as they grow.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// One for each token: its text, its logarithm, the likeliest ones' with theirs.
    tokens: Vec<Token>,
    /// Letters of the texts so far.
    letters: usize,
}

#[derive(Debug, Clone)]
struct Token {
    text: String,
    logprob: f32,
    top: Vec<(String, f32)>,
    offset: usize,
}

impl Told {
    /// Takes in a token; gives what a chunk with it alone says, where the request asked for it.
    pub(super) fn take(
        &mut self,
        kind: Kind,
        codec: Option<&TextCodec>,
        event: &TokenEvent,
    ) -> Option<Value> {
        let told = event.logprobs.as_ref().filter(|_| !event.ends_text)?;
        let text = |id: u32| match codec.map(|codec| codec.decode(&[id])) {
            Some(Ok(text)) => text,
            _ => format!("token_id:{id}"),
        };
        let token = Token {
            text: text(event.token),
            logprob: told.logprob,
            top: told.top.iter().map(|&(id, logprob)| (text(id), logprob)).collect(),
            offset: self.letters,
        };
        self.letters += token.text.chars().count();
        let alone = form(kind, std::slice::from_ref(&token));
        self.tokens.push(token);
        Some(alone)
    }

    /// What the whole answer says; null where nothing was told.
    pub(super) fn whole(&self, kind: Kind) -> Value {
        if self.tokens.is_empty() { Value::Null } else { form(kind, &self.tokens) }
    }
}

fn form(kind: Kind, tokens: &[Token]) -> Value {
    match kind {
        Kind::Chat => {
            let one = |text: &str, logprob: f32| json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() });
            let content = tokens.iter().map(|token| {
                let mut entry = one(&token.text, token.logprob);
                entry["top_logprobs"] = token.top.iter().map(|(text, logprob)| one(text, *logprob)).collect();
                entry
            });
            json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
        }
        Kind::Completion => {
            let top = |token: &Token| -> Map<String, Value> {
                token.top.iter().map(|(text, logprob)| (text.clone(), json!(logprob))).collect()
            };
            json!({
                "tokens": tokens.iter().map(|t| &t.text).collect::<Vec<_>>(),
                "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
                "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
                "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
            })
        }
    }
}

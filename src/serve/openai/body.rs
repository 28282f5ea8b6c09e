//! What clients send: read, checked, and turned into what the engine understands. A field that this server cannot
//! honour is refused by its name rather than ignored.

use crate::engine::{Message, Sampling};
use crate::serve::MAX_BODY_BYTES;
use crate::serve::error::ApiError;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::hash::{BuildHasher, RandomState};

/// Most choices of one request, over all its prompts.
const MOST_CHOICES: usize = 128;
/// Most stop texts of one request.
const MOST_STOPS: usize = 16;

/// Fields that change nothing here, whatever they say.
const HARMLESS: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
];

/// The body of `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct ChatBody {
    messages: Vec<ChatMessage>,
    #[serde(flatten)]
    pub(super) common: Common,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

/// A text, or parts of which each must be text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// The body of `/v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct CompletionBody {
    pub(super) prompt: Prompt,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// One or several prompts, as text or as ids.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

/// What both bodies share.
#[derive(Debug, Deserialize)]
pub(super) struct Common {
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    n: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    /// Chats say whether, completions how many.
    logprobs: Option<Value>,
    top_logprobs: Option<usize>,
    exflow: Option<Extension>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// What only this server has.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extension {
    /// Each token's way over layers and ranks comes with it.
    #[serde(default)]
    path: bool,
}

/// Reads a body.
pub(super) fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, ApiError> {
    let bytes = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(MAX_BODY_BYTES),
        _ => ApiError::bad_request(rejection.body_text()),
    })?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let hint =
            if bytes.is_empty() { "the body is empty; send JSON" } else { "the body is not as it must be" };
        ApiError::bad_request(format!("{hint}: {e}"))
    })
}

impl ChatBody {
    /// The messages as a chat template takes them.
    pub(super) fn messages(&self) -> Result<Vec<Message>, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "it is empty; send one at least"));
        }
        self.messages.iter().enumerate().map(|(at, message)| message.text(at)).collect()
    }
}

impl ChatMessage {
    fn text(&self, at: usize) -> Result<Message, ApiError> {
        let content = match &self.content {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => {
                let text = |part: &Part| match (part.kind.as_str(), &part.text) {
                    ("text", Some(text)) => Ok(text.clone()),
                    (kind, _) => {
                        let what = format!("a part of type {kind:?}; only text is understood");
                        Err(ApiError::field(&format!("messages[{at}].content"), what))
                    }
                };
                parts.iter().map(text).collect::<Result<String, _>>()?
            }
        };
        // What clients call the system's voice today; templates know it by its older name.
        let role = if self.role == "developer" { "system" } else { &self.role };
        Ok(Message::new(role, content))
    }
}

impl Common {
    /// Refuses what cannot be honoured, by name.
    pub(super) fn check(&self, served: &str) -> Result<(), ApiError> {
        if let Some(name) = self.model.as_deref().filter(|name| *name != served) {
            return Err(ApiError::no_model(name, served));
        }
        for (name, value) in &self.rest {
            if !HARMLESS.contains(&name.as_str()) && !is_neutral(name, value) {
                let what = "this server does not know it or cannot do it; leave it out";
                return Err(ApiError::field(name, what));
            }
        }
        match self.n() {
            0 => return Err(ApiError::field("n", "0 choices; ask for 1 at least")),
            n if n > MOST_CHOICES => {
                return Err(ApiError::field("n", format!("{n} choices; ask for {MOST_CHOICES} at most")));
            }
            _ => {}
        }
        if self.max_tokens(None) == Some(0) {
            return Err(ApiError::field("max_tokens", "0 tokens; ask for 1 at least"));
        }
        if self.stop().len() > MOST_STOPS {
            return Err(ApiError::field("stop", format!("give {MOST_STOPS} texts at most")));
        }
        if self.stop().iter().any(String::is_empty) {
            return Err(ApiError::field("stop", "an empty text; give one character at least"));
        }
        self.sampling(0).check().map_err(|(what, remedy)| ApiError::bad_request(format!("{what}; {remedy}")))
    }

    pub(super) fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub(super) fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false)
    }

    pub(super) fn n(&self) -> usize {
        self.n.unwrap_or(1)
    }

    pub(super) fn max_tokens(&self, default: Option<usize>) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens).or(default)
    }

    pub(super) fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text.clone()],
            Some(Stop::Several(texts)) => texts.clone(),
        }
    }

    pub(super) fn ignore_eos(&self) -> bool {
        self.ignore_eos.unwrap_or(false)
    }

    pub(super) fn path(&self) -> bool {
        self.exflow.as_ref().is_some_and(|e| e.path)
    }

    /// How many of the likeliest tokens each token comes with, where log-probabilities were asked for.
    pub(super) fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        match &self.logprobs {
            None | Some(Value::Null | Value::Bool(false)) if top > 0 => {
                Err(ApiError::field("top_logprobs", "it needs \"logprobs\": true"))
            }
            None | Some(Value::Null | Value::Bool(false)) => Ok(None),
            Some(Value::Bool(true)) => Ok(Some(top)),
            Some(Value::Number(number)) => match number.as_u64() {
                Some(count) => Ok(Some(count as usize)),
                None => Err(ApiError::field("logprobs", "give a whole number of 0 or more")),
            },
            Some(_) => Err(ApiError::field("logprobs", "give true, false or a number")),
        }
    }

    /// As sent, else a new one each time.
    pub(super) fn seed(&self) -> u64 {
        self.seed.map_or_else(|| RandomState::new().hash_one(0), |seed| seed as u64)
    }

    /// As OpenAI has it where nothing is said: temperature 1 over all tokens.
    pub(super) fn sampling(&self, seed: u64) -> Sampling {
        let plain = Sampling::default();
        Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            // Other servers write -1 for all.
            top_k: self.top_k.map_or(plain.top_k, |k| usize::try_from(k).unwrap_or(0)),
            top_p: self.top_p.unwrap_or(plain.top_p),
            min_p: self.min_p.unwrap_or(plain.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(plain.repetition_penalty),
            seed,
        }
    }
}

/// Whether a field that is not understood asks for nothing.
fn is_neutral(name: &str, value: &Value) -> bool {
    let empty = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) => false,
    };
    empty
        || match name {
            "best_of" => value == 1,
            "response_format" => value["type"] == "text",
            "tool_choice" | "function_call" => value == "none" || value == "auto",
            "modalities" => value.as_array().is_some_and(|list| list.iter().all(|m| m == "text")),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn common(fields: Value) -> Common {
        serde_json::from_value(fields).expect("a body")
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (fields, named) in [
            (json!({ "tools": [{ "type": "function" }] }), "tools"),
            (json!({ "logit_bias": { "5": 1 } }), "logit_bias"),
            (json!({ "presence_penalty": 0.5 }), "presence_penalty"),
            (json!({ "response_format": { "type": "json_object" } }), "response_format"),
            (json!({ "n": 0 }), "n: "),
            (json!({ "n": 1000 }), "n: "),
            (json!({ "max_tokens": 0 }), "max_tokens"),
            (json!({ "stop": "" }), "stop"),
            (json!({ "temperature": -1 }), "temperature"),
            (json!({ "top_p": 0 }), "top-p"),
            (json!({ "model": "other" }), "other"),
        ] {
            let error = common(fields).check("served").expect_err(named).body();
            let message = error["error"]["message"].as_str().unwrap_or_default();
            assert!(message.contains(named), "{named} in {error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_passes() {
        let fields = json!({
            "model": "served", "tools": [], "logprobs": false, "presence_penalty": 0, "best_of": 1, "user": "me",
            "response_format": { "type": "text" }, "tool_choice": "auto", "logit_bias": null, "top_k": -1,
        });
        let body = common(fields);
        assert!(body.check("served").is_ok());
        assert_eq!(
            (body.sampling(7).temperature, body.sampling(7).top_k, body.sampling(7).seed),
            (1.0, 0, 7)
        );
    }

    #[test]
    fn log_probabilities_as_chats_and_completions_ask_for_them() {
        for (fields, wanted) in [
            (json!({}), Ok(None)),
            (json!({ "logprobs": false }), Ok(None)),
            (json!({ "logprobs": true }), Ok(Some(0))),
            (json!({ "logprobs": true, "top_logprobs": 3 }), Ok(Some(3))),
            (json!({ "logprobs": 5 }), Ok(Some(5))),
            (json!({ "logprobs": -1 }), Err(())),
            (json!({ "top_logprobs": 3 }), Err(())),
        ] {
            assert_eq!(common(fields.clone()).logprobs().map_err(drop), wanted, "{fields}");
        }
    }

    #[test]
    fn prompts_in_their_four_forms() {
        for (prompt, ids) in [
            (json!("a"), false),
            (json!(["a", "b"]), false),
            (json!([1, 2]), true),
            (json!([[1], [2, 3]]), true),
        ] {
            let body: CompletionBody = serde_json::from_value(json!({ "prompt": prompt })).expect("a prompt");
            assert_eq!(matches!(body.prompt, Prompt::Ids(_) | Prompt::ManyIds(_)), ids, "{prompt}");
        }
        assert!(serde_json::from_value::<CompletionBody>(json!({ "prompt": 5 })).is_err());
    }

    #[test]
    fn parts_of_text_are_one_text() {
        let body = json!({ "messages": [{ "role": "developer", "content": [
            { "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }] });
        let body: ChatBody = serde_json::from_value(body).expect("a body");
        assert_eq!(body.messages().expect("text"), [Message::new("system", "ab")]);
        let image = json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] });
        let body: ChatBody = serde_json::from_value(image).expect("a body");
        assert!(body.messages().is_err());
    }
}

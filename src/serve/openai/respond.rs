//! Answers: all at once, or token by token as server-sent events. An answer that is dropped, because its client went
//! away, drops its sequences with it.

use super::body::Common;
use super::logprobs::Told;
use crate::engine::{EngineError, FinishReason, TokenEvent, Tokens};
use crate::serve::App;
use crate::serve::error::ApiError;
use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

/// Which of the two addresses is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

impl Kind {
    /// Tokens where nothing is said: OpenAI's 16 for completions, as many as fit for chats.
    pub(super) fn default_max_tokens(self) -> Option<usize> {
        match self {
            Self::Chat => None,
            Self::Completion => Some(16),
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Completion => "cmpl",
        }
    }

    fn object(self, stream: bool) -> &'static str {
        match (self, stream) {
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
            (Self::Completion, _) => "text_completion",
        }
    }
}

/// An answer on its way.
pub(super) struct Answer {
    pub(super) choices: Vec<Tokens>,
    pub(super) prompt_tokens: usize,
    head: Head,
    include_usage: bool,
}

/// What every piece of an answer begins with, and what is needed to count its times.
struct Head {
    app: Arc<App>,
    kind: Kind,
    id: String,
    created: u64,
    arrived: Instant,
    path: bool,
}

/// One choice as it grows.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: usize,
    finish: Option<FinishReason>,
    path: Vec<Value>,
    told: Told,
    last: Option<Instant>,
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Answer {
    pub(super) fn new(app: Arc<App>, kind: Kind, common: &Common, arrived: Instant) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let created = unix_seconds();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{created:x}{number:06x}", kind.prefix());
        let head = Head { app, kind, id, created, arrived, path: common.path() };
        Self { choices: Vec::new(), prompt_tokens: 0, head, include_usage: common.include_usage() }
    }

    /// Waits for the end of every choice.
    pub(super) async fn collect(self) -> Result<Response, ApiError> {
        let mut done: Vec<Choice> = self.choices.iter().map(|_| Choice::default()).collect();
        let mut events = merged(self.choices);
        while let Some((index, event)) = events.next().await {
            done[index].take(&self.head, &event?);
        }
        let completion_tokens = done.iter().map(|choice| choice.tokens).sum();
        let choices: Vec<Value> = done.iter().enumerate().map(|(i, c)| self.head.whole(i, c)).collect();
        let mut body = self.head.body(false, choices);
        body["usage"] = usage(self.prompt_tokens, completion_tokens);
        Ok(Json(body).into_response())
    }

    /// Sends tokens as they come.
    pub(super) fn stream(self) -> Response {
        let Self { choices, prompt_tokens, head, include_usage } = self;
        let count = choices.len();
        let started: Vec<Value> = match head.kind {
            Kind::Chat => (0..count).map(|i| head.chunk(i, "", Some("assistant"), None, None)).collect(),
            Kind::Completion => Vec::new(),
        };
        let state = Growing {
            head,
            done: (0..count).map(|_| Choice::default()).collect(),
            prompt_tokens,
            include_usage,
        };
        let events = merged(choices).map(Some).chain(stream::iter([None]));
        let pieces = events.scan(state, |state, event| {
            let pieces = match event {
                Some((index, Ok(event))) => Some(state.pieces(index, &event)),
                Some((_, Err(error))) => Some(vec![data(&ApiError::from(error).body())]),
                None => Some(state.end()),
            };
            std::future::ready(pieces)
        });
        let first = stream::iter(started.into_iter().map(|chunk| data(&chunk)));
        let all = first.chain(pieces.flat_map(stream::iter)).map(Ok::<_, Infallible>);
        Sse::new(all).keep_alive(KeepAlive::default()).into_response()
    }
}

/// A streamed answer between two tokens.
struct Growing {
    head: Head,
    done: Vec<Choice>,
    prompt_tokens: usize,
    include_usage: bool,
}

impl Growing {
    fn pieces(&mut self, index: usize, event: &TokenEvent) -> Vec<Event> {
        let path = self.head.path.then(|| way(event));
        let logprobs = self.done[index].take(&self.head, event);
        let mut pieces = Vec::new();
        if !event.text.is_empty() || path.is_some() || logprobs.is_some() {
            let mut chunk = self.head.chunk(index, &event.text, None, None, path);
            chunk["choices"][0]["logprobs"] = logprobs.into();
            pieces.push(data(&chunk));
        }
        if event.finish.is_some() {
            pieces.push(data(&self.head.chunk(index, "", None, event.finish, None)));
        }
        pieces
    }

    fn end(&self) -> Vec<Event> {
        let mut pieces = Vec::new();
        if self.include_usage {
            let mut chunk = self.head.body(true, Vec::new());
            chunk["usage"] = usage(self.prompt_tokens, self.done.iter().map(|choice| choice.tokens).sum());
            pieces.push(data(&chunk));
        }
        pieces.push(Event::default().data("[DONE]"));
        pieces
    }
}

impl Choice {
    /// Takes in a token; gives its log-probabilities, where they were asked for.
    fn take(&mut self, head: &Head, event: &TokenEvent) -> Option<Value> {
        let metrics = &head.app.metrics;
        let now = Instant::now();
        match self.last.replace(now) {
            None => metrics.ttft.observe((now - head.arrived).as_secs_f64()),
            Some(before) => metrics.gap.observe((now - before).as_secs_f64()),
        }
        if head.path {
            self.path.push(way(event));
        }
        self.tokens += usize::from(!event.ends_text);
        self.text += &event.text;
        self.finish = event.finish;
        if self.finish.is_some() {
            metrics.whole.observe((now - head.arrived).as_secs_f64());
        }
        self.told.take(head.kind, head.app.engine.text(), event)
    }
}

impl Head {
    fn body(&self, stream: bool, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": self.kind.object(stream),
            "created": self.created,
            "model": self.app.options.name,
            "choices": choices,
        })
    }

    fn whole(&self, index: usize, choice: &Choice) -> Value {
        let mut body = match self.kind {
            Kind::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": choice.text, "refusal": null },
                "logprobs": choice.told.whole(self.kind),
                "finish_reason": choice.finish,
            }),
            Kind::Completion => json!({
                "index": index,
                "text": choice.text,
                "logprobs": choice.told.whole(self.kind),
                "finish_reason": choice.finish,
            }),
        };
        if self.path {
            body["exflow"] = json!({ "tokens": choice.path });
        }
        body
    }

    fn chunk(
        &self,
        index: usize,
        text: &str,
        role: Option<&str>,
        finish: Option<FinishReason>,
        path: Option<Value>,
    ) -> Value {
        let mut choice = match (self.kind, role, finish) {
            (Kind::Chat, Some(role), _) => json!({ "delta": { "role": role, "content": text } }),
            (Kind::Chat, None, Some(_)) => json!({ "delta": {} }),
            (Kind::Chat, None, None) => json!({ "delta": { "content": text } }),
            (Kind::Completion, ..) => json!({ "text": text }),
        };
        choice["index"] = index.into();
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(finish);
        if let Some(path) = path {
            choice["exflow"] = json!({ "tokens": [path] });
        }
        self.body(true, vec![choice])
    }
}

/// A token with its way over layers and ranks.
fn way(event: &TokenEvent) -> Value {
    json!({ "token": event.token, "text": event.text, "path": event.path })
}

fn usage(prompt: usize, completion: usize) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
}

fn data(value: &Value) -> Event {
    Event::default().data(value.to_string())
}

/// The events of all choices as they come, each with its choice's number.
fn merged(choices: Vec<Tokens>) -> impl Stream<Item = (usize, Result<TokenEvent, EngineError>)> + Send {
    let one = |(index, tokens): (usize, Tokens)| {
        stream::unfold(tokens, move |mut tokens| async move {
            let event = tokens.next_event().await?;
            Some(((index, event), tokens))
        })
        .boxed()
    };
    stream::select_all(choices.into_iter().enumerate().map(one))
}

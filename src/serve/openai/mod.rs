//! The addresses that OpenAI's clients know.

mod body;
mod logprobs;
mod respond;

use super::App;
use super::error::ApiError;
use crate::engine::{Message, Request};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use body::{ChatBody, Common, CompletionBody, Prompt};
use respond::{Answer, Kind};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body: ChatBody = body::parse(body)?;
    body.common.check(&app.options.name)?;
    let messages = body.messages()?;
    let prompt = on_a_thread(app.clone(), move |app| render(app, &messages)).await?;
    answer(&app, Kind::Chat, vec![prompt], &body.common, arrived).await
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let CompletionBody { prompt, common } = body::parse(body)?;
    common.check(&app.options.name)?;
    let prompts = on_a_thread(app.clone(), move |app| encode(app, prompt)).await?;
    answer(&app, Kind::Completion, prompts, &common, arrived).await
}

/// Starts every choice of every prompt, then streams or collects them.
async fn answer(
    app: &Arc<App>,
    kind: Kind,
    prompts: Vec<Vec<u32>>,
    common: &Common,
    arrived: Instant,
) -> Result<Response, ApiError> {
    let mut answer = Answer::new(app.clone(), kind, common, arrived);
    let seed = common.seed();
    let logprobs = common.logprobs()?;
    for prompt in prompts {
        let room = room(app, &prompt)?;
        let max_tokens = common.max_tokens(kind.default_max_tokens()).map_or(room, |n| n.min(room));
        answer.prompt_tokens += prompt.len();
        for choice in 0..common.n() {
            let request = Request {
                prompt_ids: prompt.clone(),
                max_tokens,
                sampling: common.sampling(seed.wrapping_add(choice as u64)),
                stop: common.stop(),
                ignore_eos: common.ignore_eos(),
                path: common.path(),
                logprobs,
            };
            answer.choices.push(app.engine.submit(request)?);
        }
    }
    if common.stream() { Ok(answer.stream()) } else { answer.collect().await }
}

/// How many tokens can follow a prompt.
fn room(app: &App, prompt: &[u32]) -> Result<usize, ApiError> {
    let context = app.engine.spec().max_positions.min(app.engine.cache_positions());
    match context.checked_sub(prompt.len()) {
        None => {
            let message = format!(
                "the prompt has {} tokens, this model's context takes {context}; shorten the prompt",
                prompt.len()
            );
            Err(ApiError::too_long(message))
        }
        // The last token of a full context can still be predicted.
        Some(rest) => Ok(rest.max(1)),
    }
}

/// Text work off the threads that serve connections.
async fn on_a_thread<T: Send + 'static>(
    app: Arc<App>,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(move || work(&app)).await;
    done.unwrap_or_else(|e| Err(ApiError::internal(format!("text could not be converted: {e}"))))
}

fn render(app: &App, messages: &[Message]) -> Result<Vec<u32>, ApiError> {
    let template = app.template.as_ref().map_err(|why| {
        ApiError::bad_request(format!("{why}; or give the server one with --chat-template FILE"))
    })?;
    let text = template.render(messages)?;
    Ok(codec(app)?.encode_whole(&text)?)
}

fn encode(app: &App, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let prompts = match prompt {
        Prompt::Text(text) => vec![codec(app)?.encode(&text)?],
        Prompt::Texts(texts) => {
            let codec = codec(app)?;
            texts.iter().map(|text| codec.encode(text)).collect::<Result<_, _>>()?
        }
        Prompt::Ids(ids) => vec![ids],
        Prompt::ManyIds(prompts) => prompts,
    };
    if prompts.is_empty() {
        return Err(ApiError::field("prompt", "it is empty; give one at least"));
    }
    Ok(prompts)
}

fn codec(app: &App) -> Result<&crate::engine::TextCodec, ApiError> {
    let missing = || ApiError::bad_request("this model has no tokenizer.json; send token ids as the prompt");
    app.engine.text().ok_or_else(missing)
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [describe(&app)] }))
}

/// `GET /v1/models/{name}`.
pub(super) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if name == app.options.name {
        Ok(Json(describe(&app)))
    } else {
        Err(ApiError::no_model(&name, &app.options.name))
    }
}

fn describe(app: &App) -> Value {
    json!({
        "id": app.options.name,
        "object": "model",
        "created": respond::unix_seconds(),
        "owned_by": "exflow",
        "max_model_len": app.engine.spec().max_positions,
    })
}

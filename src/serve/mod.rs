//! The OpenAI-compatible server and its dashboard (cargo feature `server`).
//!
//! [`Server`] answers `/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI's clients expect them,
//! `/health`, `/metrics` (Prometheus) and the dashboard at `/`, all of one [`Engine`].

mod auth;
mod dashboard;
mod error;
mod live;
mod metrics;
mod openai;

use crate::engine::{ChatTemplate, Engine, EngineError};
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::ApiError;
use metrics::Metrics;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

/// Largest body of a request; a prompt of any model's context is far smaller.
const MAX_BODY_BYTES: usize = 8 << 20;

/// How a server is reached and what it calls its model.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where it listens; port 0 takes a free one.
    pub address: SocketAddr,
    /// The model's name in requests and answers.
    pub name: String,
    /// What clients must send as bearer token; `None` lets everybody in.
    pub api_key: Option<String>,
    /// Origins of web pages that may use it (`*`: any); none as a rule.
    pub cors_origins: Vec<String>,
    /// A chat template in place of the model's own.
    pub chat_template: Option<PathBuf>,
    /// How long requests that run may go on after a shutdown was asked for.
    pub grace: Duration,
    /// Milliseconds between two tokens of a request that a planner predicted, for the dashboard.
    pub predicted_ms_per_token: Option<f64>,
}

impl ServeOptions {
    /// On a free port of the loopback interface, for everybody there.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            name: name.into(),
            api_key: None,
            cors_origins: Vec::new(),
            chat_template: None,
            grace: Duration::from_secs(60),
            predicted_ms_per_token: None,
        }
    }
}

/// Why a server does not start or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The chat template that was asked for is none.
    #[error(transparent)]
    Template(EngineError),
    /// A text that cannot be an origin.
    #[error("--cors-origin {0:?} is no origin; give one as in https://example.org, or *")]
    Origin(String),
    /// The listener failed.
    #[error("the server failed: {0}")]
    Failed(#[from] std::io::Error),
}

/// What handlers share.
pub(crate) struct App {
    engine: Engine,
    options: ServeOptions,
    /// Or why there is none.
    template: Result<ChatTemplate, String>,
    metrics: Metrics,
    started: std::time::Instant,
    /// Turns true when a shutdown was asked for: streams without an end then end.
    closing: watch::Receiver<bool>,
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    router: Router,
    close: watch::Sender<bool>,
}

impl Server {
    /// Takes the address; requests are answered once it [runs](Self::run).
    ///
    /// # Errors
    /// An address that is taken, options that cannot be.
    pub async fn bind(engine: Engine, options: ServeOptions) -> Result<Self, ServeError> {
        let cors = cors(&options)?;
        let folder = engine.options().model.clone();
        let template = match &options.chat_template {
            Some(path) => Ok(ChatTemplate::from_file(&folder, path).map_err(ServeError::Template)?),
            None => ChatTemplate::open(&folder).map_err(|e| e.to_string()),
        };
        let failed = |source| ServeError::Bind { address: options.address, source };
        let listener = TcpListener::bind(options.address).await.map_err(failed)?;
        let address = listener.local_addr()?;
        let (close, closing) = watch::channel(false);
        let started = std::time::Instant::now();
        let app = Arc::new(App { engine, options, template, metrics: Metrics::default(), started, closing });
        let router = router(app.clone(), cors);
        Ok(Self { listener, address, app, router, close })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests until `shutdown` comes; then takes no more, lets those that run finish for as long as
    /// the options grant, and ends the engine.
    ///
    /// # Errors
    /// Where the listener fails.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
        let Self { listener, app, router, close, .. } = self;
        let (told, mut asked) = watch::channel(false);
        let signal = async move {
            shutdown.await;
            let _ = close.send(true);
            let _ = told.send(true);
        };
        let grace = app.options.grace;
        let serving = axum::serve(listener, router).with_graceful_shutdown(signal).into_future();
        let late = async move {
            if asked.wait_for(|asked| *asked).await.is_err() {
                std::future::pending::<()>().await; // the server itself ended
            }
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            served = serving => served?,
            () = late => tracing::warn!("requests still ran after {} s; they are cut off", grace.as_secs_f64()),
        }
        let engine = app.engine.clone();
        drop(app);
        let ended = tokio::task::spawn_blocking(move || engine.finish()).await;
        ended.map_err(|e| ServeError::Failed(std::io::Error::other(e)))
    }
}

fn router(app: Arc<App>, cors: Option<CorsLayer>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{name}", get(openai::model))
        .route("/metrics", get(metrics::scrape))
        .route("/api/model", get(live::model))
        .route("/api/live", get(live::live))
        .route("/api/affinity", get(live::affinity))
        .route_layer(axum::middleware::from_fn_with_state(app.clone(), auth::check));
    let open = Router::new().route("/health", get(health)).merge(dashboard::routes());
    let mut router = guarded
        .merge(open)
        .fallback(|| async { ApiError::not_found("there is nothing at this address") })
        .method_not_allowed_fallback(|| async { ApiError::method() })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::from_fn_with_state(app.clone(), metrics::count));
    if let Some(cors) = cors {
        router = router.layer(cors);
    }
    router.with_state(app)
}

fn cors(options: &ServeOptions) -> Result<Option<CorsLayer>, ServeError> {
    if options.cors_origins.is_empty() {
        return Ok(None);
    }
    let allowed = match options.cors_origins.iter().any(|o| o == "*") {
        true => AllowOrigin::any(),
        false => {
            let origin = |text: &String| {
                let wrong = || ServeError::Origin(text.clone());
                let has_scheme = text.split_once("://").is_some_and(|(_, host)| !host.is_empty());
                if has_scheme { text.parse::<HeaderValue>().map_err(|_| wrong()) } else { Err(wrong()) }
            };
            AllowOrigin::list(options.cors_origins.iter().map(origin).collect::<Result<Vec<_>, _>>()?)
        }
    };
    Ok(Some(CorsLayer::new().allow_origin(allowed).allow_methods(Any).allow_headers(Any)))
}

/// 200 while requests are taken, else 503 and why not.
async fn health(State(app): State<Arc<App>>) -> Response {
    match app.engine.ended() {
        None => axum::Json(serde_json::json!({ "status": "ok" })).into_response(),
        Some(cause) => {
            let body = serde_json::json!({ "status": "stopped", "cause": cause });
            (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
        }
    }
}

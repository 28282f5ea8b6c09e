//! Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with the right status.

use crate::engine::EngineError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds after which a client may try again where too many requests wait.
const RETRY_AFTER: &str = "1";

/// What a client is told went wrong.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, kind, code, param: None, message }
    }

    /// The request asks for something that cannot be.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// One field of the request cannot be what it is.
    pub(super) fn field(name: &str, message: impl Into<String>) -> Self {
        let message = format!("{name}: {}", message.into());
        Self { param: Some(name.to_owned()), ..Self::bad_request(message) }
    }

    /// The prompt is longer than the model's context.
    pub(super) fn too_long(message: String) -> Self {
        let code = Some("context_length_exceeded");
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, message)
    }

    pub(super) fn unauthorized(message: &str) -> Self {
        let code = Some("invalid_api_key");
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", code, message.to_owned())
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", None, message.into())
    }

    pub(super) fn no_model(name: &str, served: &str) -> Self {
        let message = format!("the model {name:?} is not served here; use {served:?}");
        let code = Some("model_not_found");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", code, message)
    }

    pub(super) fn method() -> Self {
        let message = "this address takes another method".to_owned();
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", None, message)
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", None, message)
    }

    pub(super) fn internal(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    pub(super) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        } })
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let unavailable = |kind| Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, None, error.to_string());
        match &error {
            EngineError::Busy { .. } => unavailable("overloaded_error"),
            EngineError::Stopped { .. } => unavailable("server_error"),
            other if other.is_input() => Self::bad_request(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

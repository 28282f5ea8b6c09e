//! The dashboard: one page whose files the binary carries. Nothing of it comes from another address, and its
//! security policy says so to the browser.

use super::App;
use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::sync::Arc;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";

/// Path, type and text of every file.
const FILES: [(&str, &str, &str); 9] = [
    ("/", HTML, include_str!("page/index.html")),
    ("/page/style.css", CSS, include_str!("page/style.css")),
    ("/page/main.js", JS, include_str!("page/main.js")),
    ("/page/api.js", JS, include_str!("page/api.js")),
    ("/page/chat.js", JS, include_str!("page/chat.js")),
    ("/page/draw.js", JS, include_str!("page/draw.js")),
    ("/page/ranks.js", JS, include_str!("page/ranks.js")),
    ("/page/maps.js", JS, include_str!("page/maps.js")),
    ("/page/path.js", JS, include_str!("page/path.js")),
];

const POLICY: &str = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
                      frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

pub(super) fn routes() -> Router<Arc<App>> {
    FILES.iter().fold(Router::new(), |router, &(path, kind, text)| {
        router.route(path, get(move || async move { file(kind, text) }))
    })
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}

//! What the dashboard draws: the model and its placement once, counts twice a second, affinity when asked.

use super::App;
use super::error::ApiError;
use crate::engine::{PlacementTable, Rank};
use axum::Json;
use axum::extract::{Query, State};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// Between two pictures.
const EVERY: Duration = Duration::from_millis(500);

/// `GET /api/model`: what does not change while the server runs, but for where experts are, which moves may change.
pub(super) async fn model(State(app): State<Arc<App>>) -> Json<Value> {
    let (spec, options) = (app.engine.spec(), app.engine.options());
    Json(json!({
        "name": app.options.name,
        "version": env!("CARGO_PKG_VERSION"),
        "layers": spec.layers,
        "moe_layers": spec.moe_layers(),
        "experts": spec.experts,
        "top_k": spec.top_k,
        "hidden": spec.hidden,
        "vocabulary": spec.vocab_size,
        "context": spec.max_positions,
        "chat": app.template.is_ok(),
        "text": app.engine.text().is_some(),
        "ranks": options.ranks,
        "strategy": options.strategy.to_string(),
        "schedule": options.schedule.to_string(),
        "transport": options.transport.to_string(),
        "combine": options.combine.to_string(),
        "numerics": options.numerics.to_string(),
        "placement": options.placement.to_string(),
        "adapters": app.engine.adapters(),
        "cache_positions": app.engine.cache_positions(),
        "assignment": assignment(&app.engine.placement(), spec.moe_layers(), spec.experts),
        "predicted_ms_per_token": app.options.predicted_ms_per_token,
        "routes_counted": app.engine.engine_options().count_routes,
    }))
}

/// `[L][E]`: the ranks that hold each expert, its primary first.
fn assignment(table: &PlacementTable, layers: usize, experts: usize) -> Vec<Vec<Vec<Rank>>> {
    let of = |l: usize, e: usize| table.holders(l.into(), e.into()).collect();
    (0..layers).map(|l| (0..experts).map(|e| of(l, e)).collect()).collect()
}

/// `GET /api/live`: server-sent events with the engine's counts.
pub(super) async fn live(State(app): State<Arc<App>>) -> Response {
    let closing = app.closing.clone();
    let pictures = stream::unfold((app, true), move |(app, first)| {
        let mut closing = closing.clone();
        async move {
            if !first {
                tokio::select! {
                    () = tokio::time::sleep(EVERY) => {}
                    _ = closing.wait_for(|closing| *closing) => return None,
                }
            }
            let mut picture = json!(app.engine.live());
            picture["uptime_s"] = json!(app.started.elapsed().as_secs_f64());
            let event = Event::default().data(picture.to_string());
            Some((Ok::<_, Infallible>(event), (app, false)))
        }
    });
    Sse::new(pictures).into_response()
}

/// Which pair of layers.
#[derive(Debug, Deserialize)]
pub(super) struct Pair {
    #[serde(default)]
    layer: usize,
}

/// `GET /api/affinity?layer=L`: how often each expert of MoE layer L + 1 followed each of layer L, `[E][E]`.
pub(super) async fn affinity(
    State(app): State<Arc<App>>,
    Query(Pair { layer }): Query<Pair>,
) -> Result<Json<Value>, ApiError> {
    let affinity = app.engine.affinity();
    if layer + 1 >= affinity.layers {
        let pairs = affinity.layers.saturating_sub(1);
        return Err(ApiError::field("layer", format!("{layer}; this model has {pairs} pairs of MoE layers")));
    }
    let counts: Vec<&[f64]> = affinity.transition(layer).chunks(affinity.experts).collect();
    Ok(Json(json!({
        "layer": layer, "experts": affinity.experts, "tokens": affinity.tokens(), "counts": counts,
    })))
}

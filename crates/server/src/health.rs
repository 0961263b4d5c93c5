//! `GET /health`, `/health/live` and `/health/ready`. They touch no lock that a step holds, so that they answer while
//! a prompt is computed.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{error::ApiError, state::AppState};

/// 200 when requests are answered, 503 while the model loads, while the server stops, or after the engine has
/// stopped.
pub(crate) async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    if state.is_draining() {
        return Err(ApiError::draining());
    }
    state.model()?;
    Ok(Json(json!({"status": "ok"})))
}

/// 200 as long as a restart would not help: while the model loads and while the server stops, too.
pub(crate) async fn live(State(state): State<AppState>) -> Response {
    if !state.is_live() {
        return ApiError::stopped().into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

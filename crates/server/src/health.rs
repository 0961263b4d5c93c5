//! `GET /health`.

use axum::{Json, extract::State};
use serde_json::{Value, json};

use crate::{error::ApiError, state::AppState};

/// 200 when requests are answered, 503 while the model loads or after the engine has stopped.
pub(crate) async fn health(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    state.model()?;
    Ok(Json(json!({"status": "ok"})))
}

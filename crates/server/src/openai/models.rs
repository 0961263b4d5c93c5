//! `GET /v1/models`.

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    state::{AppState, Model},
};

/// The one model that is served.
pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    Ok(Json(json!({"object": "list", "data": [describe(&state, &model)]})))
}

/// One model by its name.
pub(crate) async fn retrieve(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    if id != model.name {
        return Err(ApiError::model_not_found(&id));
    }
    Ok(Json(describe(&state, &model)))
}

fn describe(state: &AppState, model: &Model) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": state.created(),
        "owned_by": "oxseek",
        "max_model_len": model.engine.limits().context_tokens_max,
    })
}

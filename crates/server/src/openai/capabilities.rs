//! `GET /v1/capabilities`: what this server offers with this model, so that clients need not try.

use axum::{Json, extract::State};
use oxseek_text::CallStyle;
use serde_json::{Value, json};

use super::tools::TOOLS_MAX;
use crate::{
    error::ApiError,
    limits::EMBEDDING_INPUTS_MAX,
    state::{AppState, Model},
};

/// What is offered.
pub(crate) async fn capabilities(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    Ok(Json(describe(&model)))
}

fn describe(model: &Model) -> Value {
    let dialect = &model.dialect;
    let tokenizer = model.engine.tokenizer();
    let limits = model.engine.limits();
    let chat = model.template.is_some();
    let calls = dialect.format.calls().filter(|_| chat);
    let style = calls.map(|style| match style {
        CallStyle::Fenced => "deepseek-v3",
        CallStyle::Plain => "deepseek-v3.1",
        CallStyle::Dsml => "deepseek-v3.2",
        CallStyle::Kimi => "kimi-k2",
    });
    let fills =
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"].map(|t| tokenizer.token_id(t).is_some());
    json!({
        "model": model.name,
        "chat": chat,
        "completions": true,
        "tools": calls.is_some(),
        "tool_format": style,
        "tool_choice": if calls.is_some() { json!(["none", "auto", "required", "named"]) } else { json!([]) },
        "strict_tools": calls.is_some(),
        "parallel_tool_calls": calls.is_some(),
        "tools_max": TOOLS_MAX,
        "thinking": {
            "switch": chat && dialect.thinking_switch,
            "budget": chat && dialect.format.think_close_id().is_some(),
        },
        "response_formats": ["text", "json_object", "json_schema"],
        "structured_outputs": ["json", "json_object", "regex", "choice", "grammar"],
        "prefix": chat,
        "suffix": fills == [true; 3],
        "logprobs_max": limits.logprobs_max,
        "prompt_logprobs": limits.score_rows_max > 0,
        "echo": true,
        "embeddings": {
            "pooling": "last",
            "normalized": true,
            "dimensions": limits.embedding_width,
            "inputs_max": EMBEDDING_INPUTS_MAX,
        },
        "n_max": limits.n_max,
        "context_tokens_max": limits.context_tokens_max,
        "stop_strings_max": limits.stop_strings_max,
    })
}

//! `GET /metrics`: Prometheus text.

use std::fmt::Write;

use axum::{extract::State, http::header, response::IntoResponse};

use crate::{error::ApiError, state::AppState};

/// Counters and gauges of the engine.
pub(crate) async fn metrics(State(state): State<AppState>) -> Result<impl IntoResponse, ApiError> {
    let s = state.model()?.engine.stats();
    let seconds = |micros: u64| micros as f64 / 1e6;
    let waiting = s.sequences_waiting.min(s.requests_open);
    let rows: [(&str, &str, &str, f64); 16] = [
        ("requests_running", "gauge", "Requests that hold cache blocks", (s.requests_open - waiting) as f64),
        ("requests_waiting", "gauge", "Sequences that wait for a place", s.sequences_waiting as f64),
        ("sequences_running", "gauge", "Sequences that hold cache blocks", s.sequences_running as f64),
        ("cache_blocks_used", "gauge", "Cache blocks of 64 tokens in use", s.blocks_used as f64),
        ("cache_blocks", "gauge", "Cache blocks of 64 tokens", s.blocks_total as f64),
        ("steps_total", "counter", "Steps that ran", s.steps as f64),
        ("step_seconds_total", "counter", "Time spent in steps", seconds(s.step_micros)),
        ("requests_accepted_total", "counter", "Requests that were accepted", s.submitted as f64),
        ("requests_finished_total", "counter", "Requests that ended with all answers", s.finished as f64),
        ("requests_cancelled_total", "counter", "Requests whose client left", s.cancelled as f64),
        ("requests_failed_total", "counter", "Requests that failed", s.failed as f64),
        (
            "requests_rejected_total",
            "counter",
            "Requests refused because the queue was full",
            s.rejected as f64,
        ),
        ("prompt_tokens_total", "counter", "Prompt tokens of accepted requests", s.prompt_tokens as f64),
        ("generated_tokens_total", "counter", "Tokens that were generated", s.generated_tokens as f64),
        ("time_to_first_token_seconds_sum", "counter", "Sum of times to first token", seconds(s.ttft_micros)),
        (
            "time_to_first_token_seconds_count",
            "counter",
            "Requests with a first token",
            s.first_tokens as f64,
        ),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in rows {
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "# HELP oxseek_{name} {help}\n# TYPE oxseek_{name} {kind}\noxseek_{name} {value}");
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

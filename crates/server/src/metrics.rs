//! `GET /metrics`: Prometheus text, under vLLM's names and with its types, so that what scrapes and scales vLLM does
//! the same here. What vLLM has no name for begins with `oxseek_`.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{extract::State, http::header, response::IntoResponse};
use oxseek_engine::{BLOCK_TOKENS, Ended, Ending, FinishReason, Stats};

use crate::{error::ApiError, histogram::Histogram, state::AppState};

/// Why a request was turned away before the engine had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No key, or an unknown one.
    Key,
    /// A limit of the key.
    KeyLimit,
    /// Too many wait.
    Queue,
    /// The engine has stopped.
    Stopped,
    /// The server is about to stop.
    Draining,
    /// A foreign page or a name that is not ours.
    Foreign,
}

const REFUSALS: [(Refusal, &str); 6] = [
    (Refusal::Key, "key"),
    (Refusal::KeyLimit, "key_limit"),
    (Refusal::Queue, "queue_full"),
    (Refusal::Stopped, "stopped"),
    (Refusal::Draining, "draining"),
    (Refusal::Foreign, "foreign_origin"),
];

/// vLLM's `finished_reason`s.
const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

// Bounds as vLLM has them, in seconds.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0,
    50_000.0, 100_000.0, 200_000.0,
];
/// Seconds until an answer begins; streams go on after that.
const HTTP: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// What the server counts besides the engine.
pub(crate) struct Metrics {
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    total: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    answer_tokens: Histogram,
    http: Histogram,
    reasons: [AtomicU64; REASONS.len()],
    refusals: [AtomicU64; REFUSALS.len()],
    panics: AtomicU64,
    connections: AtomicU64,
    /// Requests by method, route and status; all three come from short lists.
    requests: Mutex<BTreeMap<(&'static str, String, u16), u64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_TOKEN),
            inter_token: Histogram::new(BETWEEN_TOKENS),
            per_token: Histogram::new(BETWEEN_TOKENS),
            total: Histogram::new(REQUEST),
            queue: Histogram::new(REQUEST),
            prefill: Histogram::new(REQUEST),
            decode: Histogram::new(REQUEST),
            prompt_tokens: Histogram::new(TOKENS),
            answer_tokens: Histogram::new(TOKENS),
            http: Histogram::new(HTTP),
            reasons: Default::default(),
            refusals: Default::default(),
            panics: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            requests: Mutex::default(),
        }
    }
}

impl Metrics {
    /// A step gave a request its next token.
    pub(crate) fn inter_token(&self, gap: Duration) {
        self.inter_token.add(gap.as_secs_f64());
    }

    /// A request was turned away.
    pub(crate) fn refused(&self, why: Refusal) {
        if let Some(at) = REFUSALS.iter().position(|(refusal, _)| *refusal == why) {
            self.refusals[at].fetch_add(1, Relaxed);
        }
    }

    /// A connection was opened.
    pub(crate) fn connected(&self) {
        self.connections.fetch_add(1, Relaxed);
    }

    /// A connection was closed.
    pub(crate) fn disconnected(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    /// A handler panicked.
    pub(crate) fn panicked(&self) {
        self.panics.fetch_add(1, Relaxed);
    }

    /// An HTTP request got its answer's head.
    pub(crate) fn answered(&self, method: &'static str, route: &str, status: u16, took: Duration) {
        self.http.add(took.as_secs_f64());
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((method, route.to_string(), status)).or_default() += 1;
    }

    /// The engine ended a request; `reasons` are those of its answers.
    pub(crate) fn ended(&self, ending: &Ending, reasons: &[FinishReason], total: Duration) {
        let usage = &ending.usage;
        let at = match ending.how {
            Ended::Finished => None,
            Ended::Cancelled => Some(2),
            Ended::Cut | Ended::Failed => Some(3),
        };
        if let Some(at) = at {
            self.reasons[at].fetch_add(1, Relaxed);
            return;
        }
        for reason in reasons {
            let at = usize::from(*reason == FinishReason::Length);
            self.reasons[at].fetch_add(1, Relaxed);
        }
        self.first_token.add(usage.ttft.as_secs_f64());
        self.total.add(total.as_secs_f64());
        self.queue.add(usage.queue.as_secs_f64());
        self.prefill.add(usage.prefill.as_secs_f64());
        self.decode.add(usage.decode.as_secs_f64());
        self.prompt_tokens.add(usage.prompt_tokens as f64);
        self.answer_tokens.add(usage.completion_tokens as f64);
        let later = usage.completion_tokens.saturating_sub(reasons.len());
        if later > 0 {
            // Answers to one prompt are written side by side.
            let steps = later as f64 / reasons.len() as f64;
            self.per_token.add(usage.decode.as_secs_f64() / steps);
        }
    }

    fn histograms(&self) -> [(&'static str, &'static str, &Histogram); 9] {
        [
            ("time_to_first_token_seconds", "Time to first token", &self.first_token),
            ("inter_token_latency_seconds", "Time between the tokens of an answer", &self.inter_token),
            (
                "time_per_output_token_seconds",
                "Mean time of a request's tokens after the first",
                &self.per_token,
            ),
            ("e2e_request_latency_seconds", "Time from submission to the end", &self.total),
            ("request_queue_time_seconds", "Time in the queue", &self.queue),
            ("request_prefill_time_seconds", "Time from the queue to the first token", &self.prefill),
            ("request_decode_time_seconds", "Time from the first token to the last", &self.decode),
            ("request_prompt_tokens", "Tokens of a prompt", &self.prompt_tokens),
            ("request_generation_tokens", "Tokens of a request's answers", &self.answer_tokens),
        ]
    }
}

/// Counters, gauges and histograms.
pub(crate) async fn metrics(State(state): State<AppState>) -> Result<impl IntoResponse, ApiError> {
    let model = state.model()?;
    let labels = format!("model_name={:?}", model.name);
    let mut text = String::new();
    engine_rows(&model.engine.stats(), &labels, &mut text);
    server_rows(&state, &labels, &mut text);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

fn engine_rows(s: &Stats, labels: &str, out: &mut String) {
    let seconds = |micros: u64| micros as f64 / 1e6;
    let waiting = s.requests_open.saturating_sub(s.requests_running);
    let used = if s.blocks_total == 0 { 0.0 } else { s.blocks_used as f64 / s.blocks_total as f64 };
    let rows: [(&str, &str, &str, f64); 18] = [
        ("vllm:num_requests_running", "gauge", "Requests in the cache", s.requests_running as f64),
        ("vllm:num_requests_waiting", "gauge", "Requests that wait for a place", waiting as f64),
        ("vllm:kv_cache_usage_perc", "gauge", "Used part of the cache, from 0 to 1", used),
        ("vllm:prompt_tokens_total", "counter", "Prompt tokens of accepted requests", s.prompt_tokens as f64),
        ("vllm:generation_tokens_total", "counter", "Tokens that were generated", s.generated_tokens as f64),
        (
            "vllm:prefix_cache_queries_total",
            "counter",
            "Prompt tokens looked for in the cache",
            s.prefix_tokens_asked as f64,
        ),
        (
            "vllm:prefix_cache_hits_total",
            "counter",
            "Prompt tokens found in the cache",
            s.prefix_tokens_found as f64,
        ),
        ("vllm:num_preemptions_total", "counter", "Sequences that lost their blocks", s.preempted as f64),
        ("oxseek_cache_blocks_kept", "gauge", "Free cache blocks kept for later", s.blocks_kept as f64),
        ("oxseek_steps_failed_total", "counter", "Steps whose forward failed", s.steps_failed as f64),
        ("oxseek_cache_blocks_used", "gauge", "Cache blocks in use", s.blocks_used as f64),
        ("oxseek_steps_total", "counter", "Steps that ran", s.steps as f64),
        ("oxseek_step_seconds_total", "counter", "Time spent in steps", seconds(s.step_micros)),
        ("oxseek_requests_accepted_total", "counter", "Requests that were accepted", s.submitted as f64),
        (
            "oxseek_requests_finished_total",
            "counter",
            "Requests that ended with all answers",
            s.finished as f64,
        ),
        ("oxseek_requests_cancelled_total", "counter", "Requests whose client left", s.cancelled as f64),
        ("oxseek_requests_failed_total", "counter", "Requests that failed", s.failed as f64),
        ("oxseek_requests_rejected_total", "counter", "Requests refused by a full queue", s.rejected as f64),
    ];
    for (name, kind, help, value) in rows {
        head(name, kind, help, out);
        let _ = writeln!(out, "{name}{{{labels}}} {value}");
    }
    head("vllm:cache_config_info", "gauge", "How the cache is laid out", out);
    let _ = writeln!(
        out,
        "vllm:cache_config_info{{{labels},block_size=\"{BLOCK_TOKENS}\",num_gpu_blocks=\"{}\"}} 1",
        s.blocks_total
    );
}

fn server_rows(state: &AppState, labels: &str, out: &mut String) {
    let m = state.metrics();
    head("oxseek_panics_total", "counter", "Handlers that panicked", out);
    let _ = writeln!(out, "oxseek_panics_total{{{labels}}} {}", m.panics.load(Relaxed));
    head("oxseek_connections", "gauge", "Open connections", out);
    let _ = writeln!(out, "oxseek_connections {}", m.connections.load(Relaxed));
    head("oxseek_log_lines_dropped_total", "counter", "Lines of the log that found no place", out);
    let _ = writeln!(out, "oxseek_log_lines_dropped_total{{{labels}}} {}", state.logger().dropped());
    let (sent, dropped) = state.tracer().counts();
    for (name, help, count) in [
        ("oxseek_spans_sent_total", "Spans that the collector took", sent),
        (
            "oxseek_spans_dropped_total",
            "Spans that found no place or that the collector did not take",
            dropped,
        ),
    ] {
        head(name, "counter", help, out);
        let _ = writeln!(out, "{name}{{{labels}}} {count}");
    }
    head("vllm:request_success_total", "counter", "Answers by how they ended", out);
    for (reason, count) in REASONS.iter().zip(&m.reasons) {
        let count = count.load(Relaxed);
        let _ = writeln!(out, "vllm:request_success_total{{{labels},finished_reason=\"{reason}\"}} {count}");
    }
    head("oxseek_requests_refused_total", "counter", "Requests turned away before the engine", out);
    for ((_, why), count) in REFUSALS.iter().zip(&m.refusals) {
        let count = count.load(Relaxed);
        let _ = writeln!(out, "oxseek_requests_refused_total{{{labels},reason=\"{why}\"}} {count}");
    }
    for (name, help, histogram) in m.histograms() {
        let name = format!("vllm:{name}");
        head(&name, "histogram", help, out);
        histogram.render(&name, labels, out);
    }
    http_rows(m, out);
    key_rows(state, out);
}

fn http_rows(m: &Metrics, out: &mut String) {
    head("http_requests_total", "counter", "HTTP requests", out);
    for ((method, route, status), n) in m.requests.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let _ = writeln!(
            out,
            "http_requests_total{{method=\"{method}\",handler={route:?},status=\"{status}\"}} {n}"
        );
    }
    head("http_request_duration_seconds", "histogram", "Time until an answer begins", out);
    m.http.render("http_request_duration_seconds", "service=\"oxseek\"", out);
}

fn key_rows(state: &AppState, out: &mut String) {
    head("oxseek_key_tokens_total", "counter", "Tokens that a key used", out);
    for key in state.keyring().keys() {
        let _ = writeln!(out, "oxseek_key_tokens_total{{key={:?}}} {}", key.name, key.book.used());
    }
}

fn head(name: &str, kind: &str, help: &str, out: &mut String) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

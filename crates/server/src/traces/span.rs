//! What is told about one request, under the names of OpenTelemetry's GenAI conventions; times also under vLLM's names.

use std::{
    fmt::Write,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::http::HeaderMap;
use oxseek_engine::{Ended, Ending, FinishReason};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

/// What a request asks the model to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Chat,
    TextCompletion,
    Embeddings,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::TextCompletion => "text_completion",
            Self::Embeddings => "embeddings",
        }
    }
}

/// The span that a request belongs to, as its `traceparent` names it (W3C Trace Context).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parent {
    trace: [u8; 16],
    span: [u8; 8],
    is_sampled: bool,
}

impl Parent {
    /// None where there is no header or a wrong one: the request then begins a trace.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all("traceparent").iter();
        let value = values.next().filter(|_| values.next().is_none())?.to_str().ok()?;
        let mut parts = value.split('-');
        let [version] = bytes(parts.next()?)?;
        let (trace, span, [flags]) = (bytes(parts.next()?)?, bytes(parts.next()?)?, bytes(parts.next()?)?);
        // Later versions may add parts.
        let is_known = version != 0xff && (version != 0 || parts.next().is_none());
        (is_known && trace != [0; 16] && span != [0; 8]).then_some(Self {
            trace,
            span,
            is_sampled: flags & 1 == 1,
        })
    }
}

/// Bytes of lower-case hexadecimal digits, exactly `N` of them.
fn bytes<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 2 * N || !digits.bytes().all(is_digit) {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        // Writing to a string cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// One request.
#[derive(Debug)]
pub(crate) struct Span {
    trace: [u8; 16],
    id: [u8; 8],
    parent: Option<[u8; 8]>,
    operation: Operation,
    model: String,
    request_id: String,
    began: SystemTime,
    clock: Instant,
    took: Duration,
    input_tokens: usize,
    output_tokens: usize,
    cached_tokens: usize,
    reasons: Vec<FinishReason>,
    /// Of the part of the request that began first.
    queue: Option<Duration>,
    first_token: Option<Duration>,
    /// How it ended, when not as it should have.
    error: Option<&'static str>,
    ended: bool,
}

impl Span {
    /// None when the parent's sampler left the trace out, or there is no randomness for its name.
    pub(super) fn begin(
        operation: Operation,
        model: &str,
        request_id: &str,
        parent: Option<&Parent>,
    ) -> Option<Self> {
        if parent.is_some_and(|p| !p.is_sampled) {
            return None;
        }
        let (random, mut trace, mut id) = (SystemRandom::new(), [0; 16], [0; 8]);
        random.fill(&mut id).ok()?;
        match parent {
            Some(parent) => trace = parent.trace,
            None => random.fill(&mut trace).ok()?,
        }
        Some(Self {
            trace,
            id,
            parent: parent.map(|p| p.span),
            operation,
            model: model.into(),
            request_id: request_id.into(),
            began: SystemTime::now(),
            clock: Instant::now(),
            took: Duration::ZERO,
            input_tokens: 0,
            output_tokens: 0,
            cached_tokens: 0,
            reasons: Vec::new(),
            queue: None,
            first_token: None,
            error: None,
            ended: false,
        })
    }

    /// The engine ended the request, or a part of it.
    pub(crate) fn add(&mut self, ending: &Ending, reasons: &[FinishReason]) {
        let usage = &ending.usage;
        self.input_tokens += usage.prompt_tokens;
        self.output_tokens += usage.completion_tokens;
        self.cached_tokens += usage.cached_tokens;
        self.reasons.extend(reasons);
        let first = |so_far: Option<Duration>, d: Duration| Some(so_far.map_or(d, |s| s.min(d)));
        self.queue = first(self.queue, usage.queue);
        if usage.completion_tokens > 0 {
            self.first_token = first(self.first_token, usage.ttft);
        }
        self.error = match ending.how {
            Ended::Finished => self.error,
            Ended::Cancelled => self.error.or(Some("cancelled")),
            Ended::Cut => Some("cut"),
            Ended::Failed => Some("failed"),
        };
        self.ended = true;
    }

    /// Nothing of the request runs any more.
    pub(crate) fn close(&mut self) {
        self.took = self.clock.elapsed();
        if !self.ended {
            self.error = Some("refused");
        }
    }

    fn to_json(&self) -> Value {
        let nanos = |t: SystemTime| t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos()).to_string();
        let mut span = json!({
            "traceId": hex(&self.trace),
            "spanId": hex(&self.id),
            "name": format!("{} {}", self.operation.name(), self.model),
            // SPAN_KIND_SERVER
            "kind": 2,
            "startTimeUnixNano": nanos(self.began),
            "endTimeUnixNano": nanos(self.began + self.took),
            "attributes": self.attributes(),
            "status": {},
        });
        if let Some(parent) = &self.parent {
            span["parentSpanId"] = hex(parent).into();
        }
        // A client that leaves is no error of the server.
        if let Some(error) = self.error.filter(|e| *e != "cancelled") {
            // STATUS_CODE_ERROR
            span["status"] = json!({"code": 2, "message": error});
        }
        span
    }

    fn attributes(&self) -> Vec<Value> {
        let reason = |r: &FinishReason| text(if *r == FinishReason::Stop { "stop" } else { "length" });
        let seconds = |d: Option<Duration>| d.map(|d| json!({"doubleValue": d.as_secs_f64()}));
        let reasons: Vec<Value> = self.reasons.iter().map(reason).collect();
        let all = [
            ("gen_ai.operation.name", Some(text(self.operation.name()))),
            ("gen_ai.provider.name", Some(text("oxseek"))),
            ("gen_ai.request.model", Some(text(&self.model))),
            ("gen_ai.response.model", Some(text(&self.model))),
            ("gen_ai.request.id", Some(text(&self.request_id))),
            ("gen_ai.usage.input_tokens", Some(whole(self.input_tokens))),
            ("gen_ai.usage.output_tokens", Some(whole(self.output_tokens))),
            ("gen_ai.usage.cache_read.input_tokens", Some(whole(self.cached_tokens))),
            (
                "gen_ai.response.finish_reasons",
                (!reasons.is_empty()).then(|| json!({"arrayValue": {"values": reasons}})),
            ),
            ("gen_ai.response.time_to_first_chunk", seconds(self.first_token)),
            ("gen_ai.latency.time_in_queue", seconds(self.queue)),
            ("gen_ai.latency.time_to_first_token", seconds(self.first_token)),
            ("gen_ai.latency.e2e", seconds(Some(self.took))),
            ("error.type", self.error.map(text)),
        ];
        all.into_iter().filter_map(|(key, value)| Some(json!({"key": key, "value": value?}))).collect()
    }
}

fn text(value: &str) -> Value {
    json!({"stringValue": value})
}

/// OTLP's JSON writes whole numbers of 64 bits as texts.
fn whole(value: usize) -> Value {
    json!({"intValue": value.to_string()})
}

/// A message of spans (`ExportTraceServiceRequest`).
pub(super) fn batch_json(spans: &[Span]) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    let resource = [("service.name", "oxseek"), ("service.version", version)];
    let resource = resource.map(|(key, value)| json!({"key": key, "value": text(value)}));
    json!({"resourceSpans": [{
        "resource": {"attributes": resource},
        "scopeSpans": [{
            "scope": {"name": "oxseek", "version": version},
            "spans": spans.iter().map(Span::to_json).collect::<Vec<_>>(),
        }],
    }]})
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn parent(values: &[&'static str]) -> Option<Parent> {
        let mut headers = HeaderMap::new();
        values.iter().for_each(|v| {
            headers.append("traceparent", HeaderValue::from_static(v));
        });
        Parent::of(&headers)
    }

    #[test]
    fn a_parent_is_what_the_trace_context_says() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let found = parent(&[good]).map(|p| (hex(&p.trace), hex(&p.span), p.is_sampled));
        assert_eq!(found, Some(("0af7651916cd43dd8448eb211c80319c".into(), "b7ad6b7169203331".into(), true)));
        assert_eq!(
            parent(&["cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more"]).map(|p| p.is_sampled),
            Some(false)
        );
        for wrong in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333g-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        ] {
            assert_eq!(parent(&[wrong]), None, "{wrong}");
        }
        assert_eq!(parent(&[good, good]), None);
        let unsampled = parent(&["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"]);
        assert!(Span::begin(Operation::Chat, "m", "r", unsampled.as_ref()).is_none());
    }
}

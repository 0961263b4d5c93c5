//! OpenTelemetry traces: one span per request, sent to a collector over HTTP in OTLP's JSON. No prompt, no answer and
//! no key is in a span.
//!
//! Nobody waits for a collector: spans go through a bounded queue, and what finds no place or is not taken by the
//! collector is counted and dropped.

mod collector;
mod span;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

pub(crate) use self::span::{Operation, Parent, Span};
use self::{collector::Collector, span::batch_json};
use crate::{
    limits::SPANS_MAX,
    logs::{Line, Logger},
};

/// Most spans of one message to the collector.
const BATCH_SPANS_MAX: usize = 512;
/// How long the exporter waits for more spans before it sends those that it has.
const BATCH_PERIOD: Duration = Duration::from_secs(1);

/// Where spans go. Cheap to clone; the default goes nowhere.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Sink>>);

struct Sink {
    collector: Collector,
    spans: mpsc::Sender<Span>,
    /// Taken by the exporter.
    waiting: Mutex<Option<mpsc::Receiver<Span>>>,
    sent: AtomicU64,
    dropped: AtomicU64,
}

impl Tracer {
    /// Spans go to the collector at `endpoint`, such as `http://127.0.0.1:4318`; `/v1/traces` is added to its path.
    ///
    /// # Errors
    /// What is wrong with the endpoint.
    pub fn to(endpoint: &str) -> Result<Self, String> {
        let collector = Collector::parse(endpoint)?;
        let (spans, waiting) = mpsc::channel(SPANS_MAX);
        let (sent, dropped) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self(Some(Arc::new(Sink { collector, spans, waiting: Mutex::new(Some(waiting)), sent, dropped }))))
    }

    /// Begins the span of a request; None when nobody wants it.
    pub(crate) fn begin(
        &self,
        operation: Operation,
        model: &str,
        request_id: &str,
        parent: Option<&Parent>,
    ) -> Option<Span> {
        self.0.as_ref()?;
        Span::begin(operation, model, request_id, parent)
    }

    /// Hands over a span that has ended. Never waits.
    pub(crate) fn end(&self, span: Span) {
        let Some(sink) = &self.0 else { return };
        if sink.spans.try_send(span).is_err() {
            sink.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Spans that the collector took, and spans that were dropped.
    pub(crate) fn counts(&self) -> (u64, u64) {
        self.0.as_ref().map_or((0, 0), |s| (s.sent.load(Relaxed), s.dropped.load(Relaxed)))
    }

    /// Sends spans until it is told to finish; then what is left.
    pub(crate) async fn export(self, logger: Logger, mut finish: watch::Receiver<bool>) {
        let Some(sink) = self.0 else { return };
        let Some(mut spans) = sink.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let mut exporter = Exporter { sink: &sink, logger, is_down: false };
        let mut batch = Vec::new();
        let mut is_last = false;
        while !is_last {
            let is_first = tokio::select! {
                n = spans.recv_many(&mut batch, 1) => n > 0,
                _ = finish.wait_for(|f| *f) => false,
            };
            is_last = !is_first || timeout(BATCH_PERIOD, finish.wait_for(|f| *f)).await.is_ok();
            loop {
                while batch.len() < BATCH_SPANS_MAX
                    && let Ok(span) = spans.try_recv()
                {
                    batch.push(span);
                }
                if batch.is_empty() {
                    break;
                }
                exporter.send(&batch).await;
                batch.clear();
            }
        }
    }
}

struct Exporter<'a> {
    sink: &'a Sink,
    logger: Logger,
    /// The last message was not taken.
    is_down: bool,
}

impl Exporter<'_> {
    async fn send(&mut self, batch: &[Span]) {
        let posted = self.sink.collector.post(batch_json(batch).to_string()).await;
        let count = if posted.is_ok() { &self.sink.sent } else { &self.sink.dropped };
        count.fetch_add(batch.len() as u64, Relaxed);
        // One line per change, not one per message.
        let was_down = std::mem::replace(&mut self.is_down, posted.is_err());
        match posted {
            Err(why) if !was_down => {
                self.logger.write(|| Line::error("the collector takes no traces").text("why", &why));
            }
            Ok(()) if was_down => self.logger.write(|| Line::info("the collector takes traces again")),
            _ => {}
        }
    }
}

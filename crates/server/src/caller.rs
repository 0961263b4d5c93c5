//! Who asks, and what the asking costs.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, request::Parts},
};
use oxseek_engine::{Ended, Ending, FinishReason, Observer, SubmitError, Ticket, ValidRequest};

use crate::{
    error::ApiError,
    keys::Key,
    logs::{Line, Logger},
    metrics::{Metrics, Refusal},
    quota::{Moment, Reserved},
    state::{AppState, Model},
    traces::{Operation, Parent, Span, Tracer},
};

/// Who sent a request. The door puts it into the request's extensions; handlers take it as an argument.
#[derive(Clone)]
pub(crate) struct Caller(Arc<Inner>);

struct Inner {
    request_id: String,
    key: Option<Arc<Key>>,
    metrics: Arc<Metrics>,
    logger: Logger,
    tracer: Tracer,
    /// The span that the request belongs to.
    parent: Option<Parent>,
}

impl Caller {
    pub(crate) fn new(
        request_id: String,
        key: Option<Arc<Key>>,
        state: &AppState,
        headers: &HeaderMap,
    ) -> Self {
        Self(Arc::new(Inner {
            request_id,
            key,
            metrics: Arc::clone(state.metrics()),
            logger: state.logger().clone(),
            tracer: state.tracer().clone(),
            parent: Parent::of(headers),
        }))
    }

    /// The key that was presented; None on a server without keys.
    pub(crate) fn key(&self) -> Option<&Arc<Key>> {
        self.0.key.as_ref()
    }

    /// Queues a request, within the limits of the caller's key.
    ///
    /// # Errors
    /// A limit of the key, a full queue, or an engine that has stopped.
    pub(crate) fn submit(
        &self,
        model: &Model,
        operation: Operation,
        request: ValidRequest,
    ) -> Result<Ticket, ApiError> {
        let tab = self.open_tab(model, operation, request.tokens_max() as u64)?;
        self.submit_on(&tab, model, request).map_err(|e| self.refuse(e))
    }

    /// Sets tokens aside for several requests to the engine that are one of the client's.
    ///
    /// # Errors
    /// A limit of the key.
    pub(crate) fn open_tab(
        &self,
        model: &Model,
        operation: Operation,
        tokens: u64,
    ) -> Result<Arc<Tab>, ApiError> {
        let reserved = self.reserve(tokens)?;
        let Inner { tracer, request_id, parent, .. } = &*self.0;
        let span = tracer.begin(operation, &model.name, request_id, parent.as_ref());
        Ok(Arc::new(Tab { reserved, used: AtomicU64::new(0), span: Mutex::new(span), caller: self.clone() }))
    }

    /// Queues a request whose tokens are set aside. The tab is settled when the last of its requests has ended and
    /// nobody holds it for more.
    pub(crate) fn submit_on(
        &self,
        tab: &Arc<Tab>,
        model: &Model,
        request: ValidRequest,
    ) -> Result<Ticket, SubmitError> {
        // Without keys everybody is the same tenant.
        let request = request.on_behalf_of(self.key().map_or(0, |k| k.tenant));
        let account = Account { tab: Arc::clone(tab), began: Instant::now(), reasons: Vec::new() };
        model.engine.submit_observed(request, Box::new(account))
    }

    /// Counts a request that the engine did not take.
    pub(crate) fn refuse(&self, e: SubmitError) -> ApiError {
        let busy = matches!(e, SubmitError::Busy | SubmitError::TenantBusy);
        self.0.metrics.refused(if busy { Refusal::Queue } else { Refusal::Stopped });
        e.into()
    }

    fn reserve(&self, tokens: u64) -> Result<Option<Reserved>, ApiError> {
        let Some(key) = &self.0.key else { return Ok(None) };
        key.book.enter(tokens, Moment::now()).map(Some).map_err(|e| {
            self.0.metrics.refused(Refusal::KeyLimit);
            ApiError::limit_reached(&e)
        })
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or(ApiError::internal())
    }
}

/// What is set aside for a request, and replaced by what it used however it ends. One that was not taken, or whose
/// engine died, pays nothing.
pub(crate) struct Tab {
    reserved: Option<Reserved>,
    used: AtomicU64,
    span: Mutex<Option<Span>>,
    caller: Caller,
}

impl Drop for Tab {
    fn drop(&mut self) {
        if let (Some(reserved), Some(key)) = (self.reserved.take(), self.caller.key()) {
            key.book.settle(reserved, *self.used.get_mut(), Moment::now());
            key.book.leave();
        }
        if let Some(mut span) = self.span.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            span.close();
            self.caller.0.tracer.end(span);
        }
    }
}

/// Keeps the books of one request on the engine's thread.
struct Account {
    tab: Arc<Tab>,
    began: Instant,
    reasons: Vec<FinishReason>,
}

impl Observer for Account {
    fn token(&mut self, gap: Duration) {
        self.tab.caller.0.metrics.inter_token(gap);
    }

    fn done(&mut self, reason: FinishReason) {
        self.reasons.push(reason);
    }

    fn ended(&mut self, ending: &Ending) {
        let usage = &ending.usage;
        // What the engine failed at is not the client's to pay.
        let used =
            if ending.how == Ended::Failed { 0 } else { usage.prompt_tokens + usage.completion_tokens };
        self.tab.used.fetch_add(used as u64, Ordering::Relaxed);
        // Held for a few instructions, by parts of the same request.
        if let Some(span) = self.tab.span.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            span.add(ending, &self.reasons);
        }
        let inner = &self.tab.caller.0;
        inner.metrics.ended(ending, &self.reasons, self.began.elapsed());
        let key = inner.key.as_ref().map(|k| k.name.as_str());
        inner.logger.write(|| {
            Line::info("request ended")
                .text("request_id", &inner.request_id)
                .optional("key", key)
                .text("how", how(ending.how))
                .number("prompt_tokens", usage.prompt_tokens)
                .number("completion_tokens", usage.completion_tokens)
                .number("cached_tokens", usage.cached_tokens)
                .number("queue_ms", millis(usage.queue))
                .number("ttft_ms", millis(usage.ttft))
                .number("total_ms", millis(self.began.elapsed()))
        });
    }
}

fn how(ended: Ended) -> &'static str {
    match ended {
        Ended::Finished => "finished",
        Ended::Cancelled => "cancelled",
        Ended::Cut => "cut",
        Ended::Failed => "failed",
    }
}

/// Milliseconds with three places after the point.
pub(crate) fn millis(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

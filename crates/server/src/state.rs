//! What every handler sees.

use std::{
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use oxseek_engine::{EngineHandle, EngineState, Sampling};
use oxseek_text::ChatTemplate;
use tokio::sync::{Semaphore, watch};

use crate::{
    dialect::Dialect,
    error::ApiError,
    keys::{KeyRecord, Keyring},
    limits::{CONNECTIONS_MAX, DRAIN_SECONDS_MAX, HEADER_SECONDS_MAX, PREPARE_TASKS_MAX, WRITE_SECONDS_MAX},
    logs::Logger,
    metrics::Metrics,
    origin::Origins,
    tls::Tls,
    traces::Tracer,
};

/// The model that is served.
pub struct Model {
    /// Its name in the API.
    pub name: String,
    /// Where requests go.
    pub engine: EngineHandle,
    /// How conversations become prompts; models without one only complete text.
    pub template: Option<ChatTemplate>,
    /// How it writes its turns.
    pub dialect: Dialect,
    /// Text of the token that begins a prompt; empty for none.
    pub bos: String,
    /// Text of the token that ends an answer.
    pub eos: String,
    /// How tokens are chosen where a request does not say.
    pub sampling: Sampling,
}

/// How a server is set up.
pub struct ServerOptions {
    /// Who may come in; an empty ring asks nobody for a key.
    pub keyring: Keyring,
    /// Web pages and names.
    pub origins: Origins,
    /// Where events are written.
    pub logger: Logger,
    /// Where spans of requests are sent.
    pub tracer: Tracer,
    /// None speaks plain HTTP.
    pub tls: Option<Tls>,
    /// How long running answers may take after the server was told to stop.
    pub drain_max: Duration,
    /// Most open connections.
    pub connections_max: usize,
    /// Longest that a client may take to send a request's head.
    pub head_max: Duration,
    /// Longest that a client may leave what was sent to it unread.
    pub write_max: Duration,
}

impl Default for ServerOptions {
    /// No keys, no foreign pages, no log, no traces, no TLS.
    fn default() -> Self {
        Self {
            keyring: Keyring::default(),
            origins: Origins::default(),
            logger: Logger::default(),
            tracer: Tracer::default(),
            tls: None,
            drain_max: DRAIN_SECONDS_MAX,
            connections_max: CONNECTIONS_MAX,
            head_max: HEADER_SECONDS_MAX,
            write_max: WRITE_SECONDS_MAX,
        }
    }
}

/// Shared state: still loading, or a model that is ready. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

struct Shared {
    model: OnceLock<Arc<Model>>,
    created: u64,
    prepare: Semaphore,
    keyring: RwLock<Arc<Keyring>>,
    options: ServerOptions,
    metrics: Arc<Metrics>,
    draining: watch::Sender<bool>,
    /// The server listens on loopback.
    local: AtomicBool,
}

impl AppState {
    /// A server whose model is not there yet: everything but the chat page answers 503.
    pub fn loading() -> Self {
        Self::new(ServerOptions::default())
    }

    /// As [`AppState::loading`], set up as told.
    pub fn new(mut options: ServerOptions) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self(Arc::new(Shared {
            model: OnceLock::new(),
            created,
            prepare: Semaphore::new(PREPARE_TASKS_MAX),
            keyring: RwLock::new(Arc::new(std::mem::take(&mut options.keyring))),
            options,
            metrics: Arc::default(),
            draining: watch::Sender::new(false),
            local: AtomicBool::new(true),
        }))
    }

    /// The model is there. Only the first one counts.
    pub fn ready(&self, model: Model) {
        let _ = self.0.model.set(Arc::new(model));
    }

    /// Takes these keys from now on. What a key that stays has used stays used.
    pub fn set_keys(&self, records: Vec<KeyRecord>) {
        let mut keyring = self.0.keyring.write().unwrap_or_else(PoisonError::into_inner);
        *keyring = Arc::new(Keyring::new(records, &keyring));
    }

    /// The model, once it is there and its engine works.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ApiError> {
        let model = self.0.model.get().cloned().ok_or(ApiError::loading())?;
        match model.engine.state() {
            EngineState::Ready => Ok(model),
            EngineState::Stuck => Err(ApiError::stuck()),
            EngineState::Draining | EngineState::Dead | EngineState::Stopped => Err(ApiError::stopped()),
        }
    }

    /// Whether a restart would not help: true while the model loads and while the server stops.
    pub fn is_live(&self) -> bool {
        let state = self.0.model.get().map(|m| m.engine.state());
        !matches!(state, Some(EngineState::Stuck | EngineState::Dead | EngineState::Stopped))
            || self.is_draining()
    }

    /// When the server began, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.0.created
    }

    pub(crate) fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.0.keyring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How the server is set up; its keys are in [`AppState::keyring`].
    pub(crate) fn options(&self) -> &ServerOptions {
        &self.0.options
    }

    pub(crate) fn origins(&self) -> &Origins {
        &self.0.options.origins
    }

    pub(crate) fn logger(&self) -> &Logger {
        &self.0.options.logger
    }

    pub(crate) fn tracer(&self) -> &Tracer {
        &self.0.options.tracer
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    pub(crate) fn set_local(&self, local: bool) {
        self.0.local.store(local, Ordering::Relaxed);
    }

    pub(crate) fn is_local(&self) -> bool {
        self.0.local.load(Ordering::Relaxed)
    }

    /// New requests are refused from now on.
    pub(crate) fn begin_drain(&self) {
        self.0.draining.send_replace(true);
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.0.draining.borrow()
    }

    /// Whether the engine has nothing left to answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.0.model.get().is_none_or(|m| !m.engine.is_alive() || m.engine.stats().requests_open == 0)
    }

    /// Runs bounded work on a prompt off the async threads, a few at a time.
    pub(crate) async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = self.0.prepare.acquire().await.map_err(|_| ApiError::internal())?;
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
    }
}

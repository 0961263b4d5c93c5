//! What every handler sees.

use std::{
    sync::{Arc, OnceLock},
    time::{SystemTime, UNIX_EPOCH},
};

use oxseek_engine::{EngineHandle, Sampling};
use oxseek_text::ChatTemplate;
use tokio::sync::Semaphore;

use crate::{dialect::Dialect, error::ApiError, limits::PREPARE_TASKS_MAX};

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

/// Shared state: still loading, or a model that is ready. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

struct Shared {
    model: OnceLock<Arc<Model>>,
    created: u64,
    prepare: Semaphore,
}

impl AppState {
    /// A server whose model is not there yet: everything but the chat page answers 503.
    pub fn loading() -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self(Arc::new(Shared { model: OnceLock::new(), created, prepare: Semaphore::new(PREPARE_TASKS_MAX) }))
    }

    /// The model is there. Only the first one counts.
    pub fn ready(&self, model: Model) {
        let _ = self.0.model.set(Arc::new(model));
    }

    /// The model, once it is there and its engine lives.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ApiError> {
        let model = self.0.model.get().cloned().ok_or(ApiError::loading())?;
        if model.engine.is_alive() { Ok(model) } else { Err(ApiError::stopped()) }
    }

    /// When the server began, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.0.created
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

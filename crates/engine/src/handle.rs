//! The world's side of an engine: start, submit, read, cancel, stop.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use oxseek_model::{LanguageModel, kv::BLOCK_TOKENS};
use oxseek_text::Tokenizer;
use thiserror::Error;

use crate::{
    EngineLimits, EngineState, Event, Observer, Request, Stats, ValidRequest,
    stats::{Counters, Pulse, add},
    step::Worker,
};

/// Tenants whose open requests are counted before those that have none are forgotten.
const TENANTS_KEPT: usize = 1024;

/// Starts engines.
pub struct Engine;

/// What an engine is started with.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Most sequences that are computed together; never more than the model was made for.
    pub sequences_max: usize,
    /// Most requests that wait for a place; more are refused.
    pub queue_requests_max: usize,
    /// Most rows of one step: prompts are cut into chunks of at most this. Never more than the model was made for.
    pub step_tokens_max: usize,
    /// Most requests of one tenant that are open; more are refused.
    pub tenant_requests_max: usize,
    /// Begin prompts behind what earlier ones left in the cache.
    pub prefix_cache: bool,
    /// How long a step may take before the engine counts as stuck.
    pub step_stall_max: Duration,
    /// Events that a reader may be behind before its sequences pause.
    pub event_channel_max: usize,
    /// How long a reader may stand still before its request is cut.
    pub reader_stall_max: Duration,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// Token ids from here on have no text and are never chosen.
    pub vocab_text: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            sequences_max: 8,
            queue_requests_max: 256,
            tenant_requests_max: usize::MAX,
            prefix_cache: true,
            step_stall_max: Duration::from_secs(300),
            step_tokens_max: 512,
            event_channel_max: 256,
            reader_stall_max: Duration::from_secs(30),
            eos_tokens: Vec::new(),
            vocab_text: usize::MAX,
        }
    }
}

/// Where requests go. Cheap to clone; the engine stops when it is told to or the last handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

struct Shared {
    commands: mpsc::Sender<Command>,
    monitor: Arc<Monitor>,
    limits: EngineLimits,
    open_requests_max: u64,
    tenant_requests_max: u64,
    /// Open requests per tenant.
    tenants: Mutex<HashMap<u64, Arc<AtomicU64>>>,
    event_channel_max: usize,
    step_stall_max: Duration,
    stopping: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    tokenizer: Arc<Tokenizer>,
}

/// What is known about the engine thread from outside.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) counters: Counters,
    pub(crate) pulse: Pulse,
}

/// What the engine thread is told.
pub(crate) enum Command {
    Submit(Box<Submission>),
    /// Nothing new: look whether readers have left or caught up.
    Wake,
    Stop,
}

pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) events: async_channel::Sender<Event>,
    pub(crate) submitted: Instant,
    pub(crate) random_seed: u64,
    pub(crate) observer: Option<Box<dyn Observer>>,
    pub(crate) place: Place,
}

/// A place among the open requests; it is free again when this is dropped.
pub(crate) struct Place {
    monitor: Arc<Monitor>,
    of_tenant: Arc<AtomicU64>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of_tenant.fetch_sub(1, Ordering::AcqRel);
        self.monitor.counters.requests_open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// Too many requests wait; later may work.
    #[error("too many requests are waiting")]
    Busy,
    /// Too many requests of this tenant are open; later may work.
    #[error("too many requests of this key are open")]
    TenantBusy,
    /// The engine has stopped or is about to.
    #[error("the engine is stopping")]
    Stopped,
}

impl Engine {
    /// Starts the thread that owns `model`.
    pub fn start(
        model: Box<dyn LanguageModel>,
        tokenizer: Arc<Tokenizer>,
        options: EngineOptions,
    ) -> EngineHandle {
        let made = model.limits();
        let step_tokens_max = options.step_tokens_max.clamp(1, made.step_rows_max);
        let sequences_max = options.sequences_max.clamp(1, made.logit_rows_max.min(step_tokens_max));
        let options = EngineOptions { sequences_max, step_tokens_max, ..options };
        let limits = EngineLimits {
            // The longest sequence must fit in the cache alone.
            context_tokens_max: made.context_tokens_max.min(made.cache_blocks * BLOCK_TOKENS),
            vocab: made.vocab,
            n_max: sequences_max,
            stop_strings_max: 16,
            stop_bytes_max: 1024,
            stop_tokens_max: 64,
            logprobs_max: 20,
            logit_bias_max: 1024,
            score_rows_max: made.logit_rows_max - sequences_max,
            embedding_width: made.hidden,
        };
        let monitor = Arc::new(Monitor { counters: Counters::default(), pulse: Pulse::new() });
        let (commands, inbox) = mpsc::channel();
        let open_requests_max = (sequences_max + options.queue_requests_max) as u64;
        let event_channel_max = options.event_channel_max.max(1);
        let tenant_requests_max = options.tenant_requests_max as u64;
        let step_stall_max = options.step_stall_max;
        let score_rows_max = limits.score_rows_max;
        let watch = Arc::clone(&monitor);
        let tokens = Arc::clone(&tokenizer);
        let work = move || {
            let end = End(watch);
            Worker::new(model, tokens, options, score_rows_max, inbox, Arc::clone(&end.0)).run();
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(work);
        let shared = Shared {
            commands,
            monitor,
            limits,
            open_requests_max,
            tenant_requests_max,
            tenants: Mutex::default(),
            event_channel_max,
            step_stall_max,
            // Without a thread every request is told that the engine has stopped.
            stopping: AtomicBool::new(thread.is_err()),
            thread: Mutex::new(thread.ok()),
            tokenizer,
        };
        EngineHandle { shared: Arc::new(shared) }
    }
}

/// Notes that the thread ended, however it did.
struct End(Arc<Monitor>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.pulse.dead.store(true, Ordering::Release);
        }
        self.0.pulse.ended.store(true, Ordering::Release);
    }
}

impl EngineHandle {
    /// Queues a request.
    ///
    /// # Errors
    /// [`SubmitError`]
    pub fn submit(&self, request: ValidRequest) -> Result<Ticket, SubmitError> {
        self.submit_with(request, None)
    }

    /// Queues a request that someone keeps books about.
    ///
    /// # Errors
    /// [`SubmitError`]; the observer is dropped without being told anything.
    pub fn submit_observed(
        &self,
        request: ValidRequest,
        observer: Box<dyn Observer>,
    ) -> Result<Ticket, SubmitError> {
        self.submit_with(request, Some(observer))
    }

    fn submit_with(
        &self,
        request: ValidRequest,
        observer: Option<Box<dyn Observer>>,
    ) -> Result<Ticket, SubmitError> {
        let s = &self.shared;
        if s.stopping.load(Ordering::Acquire) || s.monitor.pulse.dead.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        let place = s.place(request.0.tenant).inspect_err(|_| add(&s.monitor.counters.rejected, 1))?;
        let (events, receiver) = async_channel::bounded(s.event_channel_max);
        let submission = Submission {
            request: request.0,
            events,
            submitted: Instant::now(),
            random_seed: random_seed(),
            observer,
            place,
        };
        if s.commands.send(Command::Submit(Box::new(submission))).is_err() {
            return Err(SubmitError::Stopped);
        }
        add(&s.monitor.counters.submitted, 1);
        Ok(Ticket { events: receiver, commands: s.commands.clone() })
    }

    /// What the engine accepts.
    pub fn limits(&self) -> &EngineLimits {
        &self.shared.limits
    }

    /// What the engine did and does.
    pub fn stats(&self) -> Stats {
        self.shared.monitor.counters.snapshot()
    }

    /// Whether the engine does what it should. Cheap, and never waits for the engine.
    pub fn state(&self) -> EngineState {
        let s = &self.shared;
        let pulse = &s.monitor.pulse;
        let stopping = s.stopping.load(Ordering::Acquire);
        if pulse.dead.load(Ordering::Acquire) {
            EngineState::Dead
        } else if pulse.ended.load(Ordering::Acquire) {
            EngineState::Stopped
        } else if pulse.step_age().is_some_and(|age| age > s.step_stall_max) {
            EngineState::Stuck
        } else if stopping {
            EngineState::Draining
        } else {
            EngineState::Ready
        }
    }

    /// How long the step that runs now has been running; None between steps.
    pub fn step_age(&self) -> Option<Duration> {
        self.shared.monitor.pulse.step_age()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.shared.tokenizer
    }

    /// Whether the engine's thread is there to take requests.
    pub fn is_alive(&self) -> bool {
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Takes no more requests, lets the accepted ones end, and waits for that.
    pub fn shutdown(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        let _ = self.shared.commands.send(Command::Stop);
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A place for a request of a tenant.
    fn place(&self, tenant: u64) -> Result<Place, SubmitError> {
        let of_tenant = self.of_tenant(tenant);
        if !enter(&of_tenant, self.tenant_requests_max) {
            return Err(SubmitError::TenantBusy);
        }
        if !enter(&self.monitor.counters.requests_open, self.open_requests_max) {
            of_tenant.fetch_sub(1, Ordering::AcqRel);
            return Err(SubmitError::Busy);
        }
        Ok(Place { monitor: Arc::clone(&self.monitor), of_tenant })
    }

    /// The number of open requests of a tenant.
    fn of_tenant(&self, tenant: u64) -> Arc<AtomicU64> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if tenants.len() > TENANTS_KEPT {
            // A count that somebody is about to raise is shared.
            tenants.retain(|_, open| Arc::strong_count(open) > 1 || open.load(Ordering::Acquire) > 0);
        }
        Arc::clone(tenants.entry(tenant).or_default())
    }
}

/// Takes a place if there is one.
fn enter(open: &AtomicU64, most: u64) -> bool {
    let taken = open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < most).then_some(n + 1));
    taken.is_ok()
}

/// Events of one request. Dropping it cancels the request within one step.
pub struct Ticket {
    events: async_channel::Receiver<Event>,
    commands: mpsc::Sender<Command>,
}

impl Ticket {
    /// The next event; None after the last one, or when the engine cut the request.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await.ok();
        self.wake_if_drained();
        event
    }

    /// As [`Ticket::next`], waiting in place.
    pub fn next_blocking(&mut self) -> Option<Event> {
        let event = self.events.recv_blocking().ok();
        self.wake_if_drained();
        event
    }

    /// A paused sequence may go on when its reader has caught up.
    fn wake_if_drained(&self) {
        if self.events.capacity() == Some(self.events.len() + 1) {
            let _ = self.commands.send(Command::Wake);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.events.close();
        let _ = self.commands.send(Command::Wake);
    }
}

/// The standard library's hash keys are random; nothing else here needs randomness.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0u8)
}

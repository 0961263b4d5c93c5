//! The engine thread: receive, plan, run, commit.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use async_channel::TrySendError;
use oxseek_model::{Batch, LanguageModel};
use oxseek_text::Tokenizer;

use crate::{
    Bans, EngineOptions, Event, Request, Sampler, Usage,
    choice::Choice,
    handle::{Command, Submission},
    masks::{Guide, Masks},
    scheduler::{Scheduler, SchedulerLimits, SequenceId},
    stats::{Counters, add, set},
};

/// How often paused readers are looked at when nothing else is to do.
const PAUSED_POLL: Duration = Duration::from_millis(20);

/// Everything that the engine thread owns.
pub(crate) struct Worker {
    model: Box<dyn LanguageModel>,
    tokenizer: Arc<Tokenizer>,
    options: EngineOptions,
    inbox: mpsc::Receiver<Command>,
    counters: Arc<Counters>,
    scheduler: Scheduler,
    open: HashMap<u64, Open>,
    /// The request that a sequence belongs to.
    owners: HashMap<SequenceId, u64>,
    next_id: u64,
    stopping: bool,
    batch: Batch,
    sampled: Vec<SequenceId>,
    logits: Vec<f32>,
    masks: Masks,
}

/// A request that is not ended.
struct Open {
    request: Request,
    prompt_tokens: usize,
    choices: Vec<Choice>,
    outbox: Outbox,
    submitted: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
}

/// Events on their way to a reader that may be slow.
struct Outbox {
    channel: async_channel::Sender<Event>,
    backlog: VecDeque<Event>,
    blocked_since: Option<Instant>,
}

impl Worker {
    pub(crate) fn new(
        model: Box<dyn LanguageModel>,
        tokenizer: Arc<Tokenizer>,
        options: EngineOptions,
        inbox: mpsc::Receiver<Command>,
        counters: Arc<Counters>,
    ) -> Self {
        let made = model.limits();
        set(&counters.blocks_total, made.cache_blocks as u64);
        let scheduler = Scheduler::new(SchedulerLimits {
            sequences_max: options.sequences_max,
            step_tokens_max: options.step_tokens_max,
            cache_blocks: made.cache_blocks,
        });
        let logits = vec![0.0; options.sequences_max * made.vocab];
        Self {
            model,
            tokenizer,
            options,
            inbox,
            counters,
            scheduler,
            open: HashMap::new(),
            owners: HashMap::new(),
            next_id: 0,
            stopping: false,
            batch: Batch::default(),
            sampled: Vec::new(),
            logits,
            masks: Masks::new(),
        }
    }

    /// Steps until it is told to stop and nothing is left to do.
    pub(crate) fn run(mut self) {
        let mut idle = true;
        while self.receive(idle) {
            self.drop_abandoned();
            self.flush_outboxes(Instant::now());
            idle = !self.step();
            self.publish();
        }
    }

    /// Takes what was sent; waits for it when there is nothing to compute. False when it is time to end.
    fn receive(&mut self, idle: bool) -> bool {
        if idle {
            if self.open.is_empty() {
                if self.stopping {
                    return false;
                }
                match self.inbox.recv() {
                    Ok(command) => self.take(command),
                    Err(mpsc::RecvError) => return false,
                }
            } else {
                match self.inbox.recv_timeout(PAUSED_POLL) {
                    Ok(command) => self.take(command),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    // All handles and tickets are gone: nobody reads any more.
                    Err(mpsc::RecvTimeoutError::Disconnected) => self.stopping = true,
                }
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
        true
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.accept(*submission),
            Command::Wake => {}
            Command::Stop => self.stopping = true,
        }
    }

    fn accept(&mut self, submission: Submission) {
        let choices = guarded(|| self.choices(&submission.request, submission.random_seed));
        let Submission { mut request, events, submitted, .. } = submission;
        let prompt_tokens = request.prompt.len();
        let request_id = self.next_id;
        self.next_id += request.n as u64;
        let choices = match choices {
            Ok(choices) => choices,
            Err(message) => {
                add(&self.counters.failed, 1);
                // The channel is new: there is room.
                let _ = events.try_send(Event::Failed { message });
                self.counters.requests_open.fetch_sub(1, std::sync::atomic::Ordering::AcqRel);
                return;
            }
        };
        add(&self.counters.prompt_tokens, prompt_tokens as u64);
        self.owners.extend(choices.iter().map(|c| (c.sequence, request_id)));
        self.scheduler.submit(choices[0].sequence, request.prompt.clone(), request.n - 1);
        if request.sampling.repetition_penalty == 1.0 {
            // The scheduler has its own copy; only this penalty needs another.
            request.prompt.truncate(0);
        }
        let outbox = Outbox { channel: events, backlog: VecDeque::new(), blocked_since: None };
        let open =
            Open { request, prompt_tokens, choices, outbox, submitted, admitted: None, first_token: None };
        self.open.insert(request_id, open);
    }

    /// The answers of a new request, nothing of them written yet.
    fn choices(&self, request: &Request, random_seed: u64) -> Result<Vec<Choice>, String> {
        let eos = &self.options.eos_tokens;
        let bans = Bans {
            always: if request.ignore_eos { eos.clone() } else { Vec::new() },
            early: eos.iter().chain(&request.stop_tokens).copied().collect(),
            early_tokens: request.min_tokens,
        };
        let choice = |index: usize| {
            let sequence = SequenceId(self.next_id + index as u64);
            let (sampling, vocab) = (request.sampling.clone(), self.options.vocab_text);
            let sampler = Sampler::new(sampling, index, random_seed, vocab, bans.clone());
            let constraint = request.grammar.as_ref().map(|g| g.start()).transpose()?;
            let guide = constraint.map(|c| Guide::new(c, self.model.limits().vocab));
            Ok(Choice::new(sequence, index, sampler, guide, request, &self.tokenizer))
        };
        (0..request.n).map(choice).collect()
    }

    /// Ends requests whose ticket was dropped.
    fn drop_abandoned(&mut self) {
        let left: Vec<u64> =
            self.open.iter().filter(|(_, o)| o.outbox.channel.is_closed()).map(|(&id, _)| id).collect();
        for id in left {
            add(&self.counters.cancelled, 1);
            self.close(id);
        }
    }

    /// Sends what readers could not take before; pauses those that still cannot and cuts those that never do.
    fn flush_outboxes(&mut self, now: Instant) {
        let mut cut = Vec::new();
        let mut ended = Vec::new();
        for (&id, open) in &mut self.open {
            let was_blocked = open.outbox.blocked_since.is_some();
            open.outbox.flush(now);
            let blocked = open.outbox.blocked_since;
            if was_blocked != blocked.is_some() {
                open.choices.iter().for_each(|c| self.scheduler.pause(c.sequence, blocked.is_some()));
            }
            if blocked.is_some_and(|since| now - since > self.options.reader_stall_max) {
                cut.push(id);
            } else if open.choices.iter().all(|c| c.done) && blocked.is_none() {
                ended.push(id);
            }
        }
        for id in cut {
            add(&self.counters.failed, 1);
            self.close(id);
        }
        ended.into_iter().for_each(|id| self.close(id));
    }

    /// Plans, runs and commits one step. False when there was nothing to do.
    fn step(&mut self) -> bool {
        self.scheduler.plan(&mut self.batch, &mut self.sampled);
        if self.batch.sequences.is_empty() {
            return false;
        }
        let began = Instant::now();
        self.note_admissions(began);
        let rows = self.batch.logit_rows() * self.model.limits().vocab;
        self.begin_masks();
        // A panic in a kernel must cost the requests of this step, not the engine. The model's state is its cache,
        // of which nothing that this step wrote is used again.
        let (model, batch, logits) = (&mut self.model, &self.batch, &mut self.logits[..rows]);
        let ran = catch_unwind(AssertUnwindSafe(|| model.forward(batch, logits)));
        self.collect_masks();
        match ran {
            Ok(Ok(())) => {
                self.scheduler.advance();
                self.commit();
            }
            Ok(Err(e)) => self.fail_step(&e.to_string()),
            Err(_) => self.fail_step("the engine met an internal error in this step"),
        }
        add(&self.counters.steps, 1);
        add(&self.counters.step_micros, began.elapsed().as_micros() as u64);
        true
    }

    /// Has the masks made that this step's tokens need.
    fn begin_masks(&mut self) {
        for sequence in &self.sampled {
            let Some(open) = self.owners.get(sequence).and_then(|r| self.open.get_mut(r)) else { continue };
            // The first row of logits is every answer's.
            let first = open.first_token.is_none();
            for choice in open.choices.iter_mut().filter(|c| first || c.sequence == *sequence) {
                if let Some(guide) = choice.guide.take() {
                    self.masks.begin(choice.sequence, guide);
                }
            }
        }
    }

    fn collect_masks(&mut self) {
        while let Some((sequence, outcome)) = self.masks.next() {
            let Some(&request_id) = self.owners.get(&sequence) else { continue };
            match outcome {
                Ok(guide) => {
                    let Some(open) = self.open.get_mut(&request_id) else { continue };
                    if let Some(choice) = open.choices.iter_mut().find(|c| c.sequence == sequence) {
                        choice.guide = Some(guide);
                    }
                }
                Err(message) => self.fail(request_id, message),
            }
        }
    }

    fn note_admissions(&mut self, now: Instant) {
        for id in self.scheduler.planned() {
            if let Some(open) = self.owners.get(&id).and_then(|r| self.open.get_mut(r)) {
                open.admitted.get_or_insert(now);
            }
        }
    }

    /// Samples a token for every row of logits and sends what comes of it.
    fn commit(&mut self) {
        let now = Instant::now();
        let vocab = self.model.limits().vocab;
        for (at, sequence) in std::mem::take(&mut self.sampled).into_iter().enumerate() {
            let Some(&request_id) = self.owners.get(&sequence) else { continue };
            let row = at * vocab..(at + 1) * vocab;
            if let Err(message) = guarded(|| self.commit_row(request_id, sequence, row, now)) {
                self.fail(request_id, message);
            }
        }
    }

    fn commit_row(
        &mut self,
        request_id: u64,
        sequence: SequenceId,
        row: std::ops::Range<usize>,
        now: Instant,
    ) -> Result<(), String> {
        let Some(open) = self.open.get_mut(&request_id) else { return Ok(()) };
        if open.first_token.is_none() {
            open.first_token = Some(now);
            add(&self.counters.first_tokens, 1);
            add(&self.counters.ttft_micros, (now - open.submitted).as_micros() as u64);
            // The prompt is done: the other answers fork from it, and all draw from this row.
            for choice in &open.choices[1..] {
                if let Some((from, to)) = self.scheduler.fork(sequence, choice.sequence) {
                    self.model.copy_block(from, to).map_err(|e| e.to_string())?;
                }
            }
            for at in 0..open.choices.len() {
                self.commit_token(request_id, at, row.clone())?;
            }
        } else if let Some(at) = open.choices.iter().position(|c| c.sequence == sequence) {
            self.commit_token(request_id, at, row)?;
        }
        self.end_if_done(request_id, now);
        Ok(())
    }

    fn commit_token(
        &mut self,
        request_id: u64,
        at: usize,
        row: std::ops::Range<usize>,
    ) -> Result<(), String> {
        let Some(open) = self.open.get_mut(&request_id) else { return Ok(()) };
        let (request, choice) = (&open.request, &mut open.choices[at]);
        let ends: Vec<u32> = self.options.eos_tokens.iter().chain(&request.stop_tokens).copied().collect();
        let sampled = choice.sample(&self.logits[row], request, &ends).map_err(|e| e.to_string())?;
        if let Some(sampled) = &sampled {
            add(&self.counters.generated_tokens, 1);
            self.scheduler.append(choice.sequence, sampled.id);
        }
        let mut events = Vec::new();
        match sampled {
            Some(sampled) if !choice.must_end() && !ends.contains(&sampled.id) => {
                choice.commit(sampled, request, &self.tokenizer, &mut events)?;
            }
            end => choice.commit_end(end, request, &mut events),
        }
        if choice.done {
            self.scheduler.finish(choice.sequence);
        }
        open.outbox.backlog.extend(events);
        Ok(())
    }

    /// Sends the events of this step, and the last one when all answers have ended.
    fn end_if_done(&mut self, request_id: u64, now: Instant) {
        let Some(open) = self.open.get_mut(&request_id) else { return };
        let done = open.choices.iter().all(|c| c.done);
        if done {
            add(&self.counters.finished, 1);
            let usage = open.usage(now);
            open.outbox.backlog.push_back(Event::Finished { usage });
        }
        open.outbox.flush(now);
        let blocked = open.outbox.blocked_since.is_some();
        if blocked {
            open.choices.iter().for_each(|c| self.scheduler.pause(c.sequence, true));
        } else if done {
            self.close(request_id);
        }
    }

    /// Fails every request of the step.
    fn fail_step(&mut self, message: &str) {
        let failed: Vec<SequenceId> = self.scheduler.planned().collect();
        for sequence in failed {
            if let Some(&request) = self.owners.get(&sequence) {
                self.fail(request, message.to_string());
            }
        }
    }

    fn fail(&mut self, request_id: u64, message: String) {
        if let Some(open) = self.open.get_mut(&request_id) {
            add(&self.counters.failed, 1);
            // A reader that is behind sees its stream end without the last event.
            let _ = open.outbox.channel.try_send(Event::Failed { message });
        }
        self.close(request_id);
    }

    /// Forgets a request and frees what it held.
    fn close(&mut self, request_id: u64) {
        let Some(open) = self.open.remove(&request_id) else { return };
        for choice in &open.choices {
            self.scheduler.finish(choice.sequence);
            self.owners.remove(&choice.sequence);
        }
        self.counters.requests_open.fetch_sub(1, std::sync::atomic::Ordering::AcqRel);
    }

    fn publish(&self) {
        let (used, _) = self.scheduler.blocks();
        set(&self.counters.blocks_used, used as u64);
        set(&self.counters.sequences_running, self.scheduler.running() as u64);
        set(&self.counters.sequences_waiting, self.scheduler.waiting() as u64);
    }
}

/// Runs what must not hurt more than the one request it is done for.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the engine met an internal error in this request".into()))
}

impl Open {
    fn usage(&self, now: Instant) -> Usage {
        let admitted = self.admitted.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.choices.iter().map(|c| c.tokens.len()).sum(),
            cached_tokens: 0,
            prefill: first - admitted,
            decode: now - first,
            ttft: first - self.submitted,
        }
    }
}

impl Outbox {
    /// Sends as much as the reader takes.
    fn flush(&mut self, now: Instant) {
        while let Some(event) = self.backlog.pop_front() {
            match self.channel.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    self.blocked_since.get_or_insert(now);
                    return;
                }
                // The reader left; the next look at abandoned requests ends it.
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
        self.blocked_since = None;
    }
}

//! The engine thread: receive, plan, run, commit.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Release, mpsc},
    time::{Duration, Instant},
};

use oxseek_model::{Batch, LanguageModel, LogitRows, ModelError};
use oxseek_text::Tokenizer;

use crate::{
    Bans, Ended, EngineOptions, Event, FinishReason, Request, SampleError, Sampler, Task,
    choice::{Choice, token_info},
    handle::{Command, Monitor, Submission},
    masks::{Guide, Masks},
    open::{Open, Outbox},
    sampler::{rank, score},
    scheduler::{Arrival, Scheduler, SchedulerLimits, SequenceId, Wanted},
    stats::{add, set},
};

/// How often paused readers are looked at when nothing else is to do.
const PAUSED_POLL: Duration = Duration::from_millis(20);

/// Everything that the engine thread owns.
pub(crate) struct Worker {
    model: Box<dyn LanguageModel>,
    tokenizer: Arc<Tokenizer>,
    options: EngineOptions,
    inbox: mpsc::Receiver<Command>,
    monitor: Arc<Monitor>,
    scheduler: Scheduler,
    open: HashMap<u64, Open>,
    /// The request that a sequence belongs to.
    owners: HashMap<SequenceId, u64>,
    next_id: u64,
    stopping: bool,
    batch: Batch,
    wanted: Vec<Wanted>,
    logits: Vec<f32>,
    /// Hidden states of the rows of logits, in a step that completes a prompt to embed; else what an earlier one left.
    hidden: Vec<f32>,
    masks: Masks,
}

/// Why a request failed.
struct Failure {
    message: String,
    /// What it computed cannot be trusted.
    broken: bool,
    /// Its grammar cannot be followed.
    by_grammar: bool,
}

impl Failure {
    fn of_grammar(message: String) -> Self {
        Self { by_grammar: true, ..message.into() }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self { message, broken: false, by_grammar: false }
    }
}

impl From<SampleError> for Failure {
    fn from(e: SampleError) -> Self {
        Self { broken: e == SampleError::NotFinite, ..e.to_string().into() }
    }
}

impl Worker {
    pub(crate) fn new(
        model: Box<dyn LanguageModel>,
        tokenizer: Arc<Tokenizer>,
        options: EngineOptions,
        score_rows_max: usize,
        inbox: mpsc::Receiver<Command>,
        monitor: Arc<Monitor>,
    ) -> Self {
        let made = model.limits();
        set(&monitor.counters.blocks_total, made.cache_blocks as u64);
        let scheduler = Scheduler::new(SchedulerLimits {
            sequences_max: options.sequences_max,
            step_tokens_max: options.step_tokens_max,
            score_rows_max,
            cache_blocks: made.cache_blocks,
            reuse: options.prefix_cache,
        });
        let logits = vec![0.0; (options.sequences_max + score_rows_max) * made.vocab];
        Self {
            model,
            tokenizer,
            options,
            inbox,
            monitor,
            scheduler,
            open: HashMap::new(),
            owners: HashMap::new(),
            next_id: 0,
            stopping: false,
            batch: Batch::default(),
            wanted: Vec::new(),
            logits,
            hidden: Vec::new(),
            masks: Masks::new(),
        }
    }

    /// Steps until it is told to stop and nothing is left to do, or the model is broken.
    pub(crate) fn run(mut self) {
        let mut idle = true;
        while self.receive(idle) {
            self.drop_abandoned();
            self.flush_outboxes(Instant::now());
            idle = !self.step();
            self.publish();
            if self.monitor.pulse.dead.load(std::sync::atomic::Ordering::Relaxed) {
                return self.bury();
            }
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
        let Submission { mut request, events, submitted, place, observer, .. } = submission;
        let request_id = self.next_id;
        self.next_id += request.n as u64;
        let prompt_tokens = request.prompt.len();
        add(&self.monitor.counters.prompt_tokens, prompt_tokens as u64);
        let (choices, failure) = match choices {
            Ok(choices) => (choices, None),
            Err(failure) => (Vec::new(), Some(failure)),
        };
        if let Some(first) = choices.first() {
            self.scheduler.submit(first.sequence, self.arrival(&request));
        }
        self.owners.extend(choices.iter().map(|c| (c.sequence, request_id)));
        if request.sampling.repetition_penalty == 1.0 && request.prompt_logprobs.is_none() {
            // The scheduler has its own copy.
            request.prompt = Vec::new();
        }
        let open = Open {
            request,
            prompt_tokens,
            cached_tokens: 0,
            choices,
            outbox: Outbox::new(events),
            place,
            submitted,
            admitted: None,
            first_token: None,
            last_token: None,
            observer,
        };
        self.open.insert(request_id, open);
        if let Some(failure) = failure {
            self.fail(request_id, failure);
        }
    }

    fn arrival(&self, request: &Request) -> Arrival {
        let tokens = request.prompt.len();
        let blocks = oxseek_model::kv::blocks_for(tokens);
        Arrival {
            prompt: request.prompt.clone(),
            forks: request.n - 1,
            priority: request.priority,
            tenant: request.tenant,
            salt: request.cache_salt.clone(),
            forms: (0..blocks).map(|b| self.model.block_form(b, tokens)).collect(),
            score: request.prompt_logprobs.is_some(),
        }
    }

    /// The answers of a new request, nothing of them written yet.
    fn choices(&self, request: &Request, random_seed: u64) -> Result<Vec<Choice>, Failure> {
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
            add(&self.monitor.counters.cancelled, 1);
            self.end(id, Ended::Cancelled);
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
            add(&self.monitor.counters.failed, 1);
            self.end(id, Ended::Cut);
            self.close(id);
        }
        for id in ended {
            self.close(id);
        }
    }

    /// Plans, runs and commits one step. False when there was nothing to do.
    fn step(&mut self) -> bool {
        self.scheduler.plan(&mut self.batch, &mut self.wanted);
        if self.batch.sequences.is_empty() {
            return false;
        }
        let began = Instant::now();
        self.monitor.pulse.step_begins(began);
        self.note_admissions(began);
        self.begin_masks();
        let ran = self.forward();
        self.collect_masks();
        match ran {
            Ok(()) => {
                let planned: Vec<SequenceId> = self.scheduler.planned().collect();
                self.scheduler.advance();
                self.report_progress(&planned);
                self.commit();
            }
            Err(error) => self.fail_step(error.as_ref()),
        }
        self.monitor.pulse.step_ends();
        add(&self.monitor.counters.steps, 1);
        add(&self.monitor.counters.step_micros, began.elapsed().as_micros() as u64);
        true
    }

    /// Runs the batch. A panic in a kernel must cost the requests of the step, not the engine: None stands for one.
    fn forward(&mut self) -> Result<(), Option<ModelError>> {
        let rows = self.batch.logit_rows() * self.model.limits().vocab;
        let embeds = self.wanted.iter().any(|w| w.draw && self.embeds(w.id));
        let (model, batch, logits) = (&mut self.model, &self.batch, &mut self.logits[..rows]);
        let (scheduler, hidden) = (&self.scheduler, &mut self.hidden);
        let run = || {
            scheduler.copies().try_for_each(|(from, to)| model.copy_block(from, to))?;
            model.forward(batch, logits)?;
            if !embeds {
                return Ok(());
            }
            hidden.resize(batch.logit_rows() * model.limits().hidden, 0.0);
            model.read_hidden(batch.logit_rows(), hidden)
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Some(e)),
            Err(_) => Err(None),
        }
    }

    fn embeds(&self, id: SequenceId) -> bool {
        self.owners
            .get(&id)
            .and_then(|r| self.open.get(r))
            .is_some_and(|open| open.request.task == Task::Embed)
    }

    /// Has the masks made that this step's tokens need.
    fn begin_masks(&mut self) {
        for wanted in self.wanted.iter().filter(|w| w.draw) {
            let owner = self.owners.get(&wanted.id);
            let Some(open) = owner.and_then(|r| self.open.get_mut(r)) else { continue };
            // The first row of logits is every answer's.
            let first = open.first_token.is_none();
            for choice in open.choices.iter_mut().filter(|c| first || c.sequence == wanted.id) {
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
                Err(message) => self.fail(request_id, Failure::of_grammar(message)),
            }
        }
    }

    fn note_admissions(&mut self, now: Instant) {
        for id in self.scheduler.planned() {
            let Some(open) = self.owners.get(&id).and_then(|r| self.open.get_mut(r)) else { continue };
            if open.admitted.is_none() {
                open.admitted = Some(now);
                open.cached_tokens = self.scheduler.progress(id).map_or(0, |p| p.cached);
            }
        }
    }

    fn report_progress(&self, planned: &[SequenceId]) {
        for id in planned {
            let Some(open) = self.owners.get(id).and_then(|r| self.open.get(r)) else { continue };
            let Some(p) = self.scheduler.progress(*id) else { continue };
            if open.request.progress && open.first_token.is_none() && p.done < p.total {
                open.outbox.offer(Event::Progress { done: p.done, total: p.total, cached: p.cached });
            }
        }
    }

    /// Uses every row of logits and sends what comes of it.
    fn commit(&mut self) {
        let now = Instant::now();
        let mut row = 0;
        for wanted in std::mem::take(&mut self.wanted) {
            let rows = row..row + wanted.rows;
            row = rows.end;
            let Some(&request_id) = self.owners.get(&wanted.id) else { continue };
            if let Err(failure) = guarded(|| self.commit_rows(request_id, wanted, rows, now)) {
                self.fail(request_id, failure);
            }
        }
    }

    /// Uses the rows of one sequence.
    fn commit_rows(
        &mut self,
        request_id: u64,
        wanted: Wanted,
        rows: std::ops::Range<usize>,
        now: Instant,
    ) -> Result<(), Failure> {
        let vocab = self.model.limits().vocab;
        let values = &self.logits[rows.start * vocab..rows.end * vocab];
        if !values.chunks_exact(vocab).all(|row| all_finite(&row[..vocab.min(self.options.vocab_text)])) {
            return Err(SampleError::NotFinite.into());
        }
        self.report_scores(request_id, wanted, rows.start);
        if wanted.draw && self.embeds(wanted.id) {
            self.commit_embedding(request_id, wanted.id, rows.end - 1, now)?;
        } else if wanted.draw {
            self.commit_draw(request_id, wanted.id, (rows.end - 1) * vocab..rows.end * vocab, now)?;
            if let Some(open) = self.open.get_mut(&request_id) {
                open.note_token(now);
            }
        }
        self.end_if_done(request_id, now);
        Ok(())
    }

    /// The prompt is done: its last row's hidden state is the answer.
    fn commit_embedding(
        &mut self,
        request_id: u64,
        sequence: SequenceId,
        row: usize,
        now: Instant,
    ) -> Result<(), Failure> {
        let width = self.model.limits().hidden;
        let values = self.hidden[row * width..(row + 1) * width].to_vec();
        if !all_finite(&values) {
            return Err(SampleError::NotFinite.into());
        }
        let Some(open) = self.open.get_mut(&request_id) else { return Ok(()) };
        open.first_token = Some(now);
        self.scheduler.finish(sequence);
        open.choices.iter_mut().for_each(|c| c.done = true);
        let done = Event::Done { choice: 0, reason: FinishReason::Stop, matched: None };
        let events = [Event::Embedding { values }, done];
        open.note_done(&events);
        open.outbox.backlog.extend(events);
        Ok(())
    }

    /// Log-probabilities of prompt tokens, each from the row before it.
    fn report_scores(&mut self, request_id: u64, wanted: Wanted, first_row: usize) {
        let vocab = self.model.limits().vocab;
        let Some(open) = self.open.get_mut(&request_id) else { return };
        let Some(count) = open.request.prompt_logprobs.filter(|_| open.first_token.is_none()) else { return };
        let start = wanted.position + 1;
        let Some(prompt) = open.request.prompt.get(start..) else { return };
        let rows = self.logits[first_row * vocab..].chunks_exact(vocab);
        let (tokens, ranks): (Vec<_>, Vec<_>) = prompt
            .iter()
            .take(wanted.rows)
            .zip(rows)
            .map(|(&id, row)| (token_info(score(row, id, count), &self.tokenizer), rank(row, id)))
            .unzip();
        if !tokens.is_empty() {
            open.outbox.backlog.push_back(Event::PromptLogprobs { start, tokens, ranks });
        }
    }

    /// Draws the next token of a sequence from its row, or the first one of every answer.
    fn commit_draw(
        &mut self,
        request_id: u64,
        sequence: SequenceId,
        row: std::ops::Range<usize>,
        now: Instant,
    ) -> Result<(), Failure> {
        let Some(open) = self.open.get_mut(&request_id) else { return Ok(()) };
        if open.first_token.is_none() {
            open.first_token = Some(now);
            let ttft = now - open.submitted;
            add(&self.monitor.counters.first_tokens, 1);
            add(&self.monitor.counters.ttft_micros, ttft.as_micros() as u64);
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
        Ok(())
    }

    fn commit_token(
        &mut self,
        request_id: u64,
        at: usize,
        row: std::ops::Range<usize>,
    ) -> Result<(), Failure> {
        let Some(open) = self.open.get_mut(&request_id) else { return Ok(()) };
        let (request, choice) = (&open.request, &mut open.choices[at]);
        let ends: Vec<u32> = self.options.eos_tokens.iter().chain(&request.stop_tokens).copied().collect();
        let sampled = choice.sample(&self.logits[row], request, &ends)?;
        if let Some(sampled) = &sampled {
            add(&self.monitor.counters.generated_tokens, 1);
            self.scheduler.append(choice.sequence, sampled.id);
        }
        let mut events = Vec::new();
        match sampled {
            Some(sampled) if !choice.must_end() && !ends.contains(&sampled.id) => {
                choice.commit(sampled, request, &self.tokenizer, &mut events).map_err(Failure::of_grammar)?;
            }
            end => choice.commit_end(end, request, &mut events),
        }
        if choice.done {
            self.scheduler.finish(choice.sequence);
        }
        open.note_done(&events);
        for event in &events {
            if let Event::Done { reason, .. } = event {
                let c = &self.monitor.counters;
                add(if *reason == FinishReason::Stop { &c.answers_stopped } else { &c.answers_cut }, 1);
            }
        }
        open.outbox.backlog.extend(events);
        Ok(())
    }

    /// Sends the events of this step, and the last one when all answers have ended.
    fn end_if_done(&mut self, request_id: u64, now: Instant) {
        let Some(open) = self.open.get_mut(&request_id) else { return };
        let done = open.choices.iter().all(|c| c.done);
        if done {
            add(&self.monitor.counters.finished, 1);
            let usage = open.usage(now);
            open.end(Ended::Finished, now);
            open.outbox.backlog.push_back(Event::Finished { usage });
        }
        if done && open.outbox.fits() {
            // Whoever sees the end may ask again at once: the place is free by then.
            if let Some(mut outbox) = self.close(request_id) {
                outbox.flush(now);
            }
            return;
        }
        open.outbox.flush(now);
        if open.outbox.blocked_since.is_some() {
            open.choices.iter().for_each(|c| self.scheduler.pause(c.sequence, true));
        } else if done {
            self.close(request_id);
        }
    }

    /// Fails every request of the step, and the engine when the model does not work any more.
    fn fail_step(&mut self, error: Option<&ModelError>) {
        add(&self.monitor.counters.steps_failed, 1);
        self.scheduler.step_failed();
        let message = match error {
            Some(e) => e.to_string(),
            None => "the engine met an internal error in this step".into(),
        };
        let failed: Vec<SequenceId> = self.scheduler.planned().collect();
        for sequence in failed {
            if let Some(&request) = self.owners.get(&sequence) {
                self.fail(request, message.clone().into());
            }
        }
        // A batch that was refused has not run.
        if !matches!(error, Some(ModelError::Batch(_))) && !self.works() {
            self.monitor.pulse.dead.store(true, Release);
        }
    }

    /// Whether the model computes one row. Nothing that a failed step wrote is used again, so if it does, the engine
    /// can go on.
    fn works(&mut self) -> bool {
        let Some(block) = self.scheduler.lend_block() else { return true };
        self.batch.clear();
        self.batch.push(&[0], 0, 1, &[block], LogitRows::Last);
        let ran = self.forward().is_ok();
        self.scheduler.take_back(block);
        let vocab = self.model.limits().vocab.min(self.options.vocab_text);
        ran && all_finite(&self.logits[..vocab])
    }

    fn fail(&mut self, request_id: u64, failure: Failure) {
        self.end(request_id, Ended::Failed);
        if let Some(open) = self.open.get_mut(&request_id) {
            add(&self.monitor.counters.failed, 1);
            if failure.broken {
                open.choices.iter().for_each(|c| self.scheduler.discard(c.sequence));
            }
        }
        if let Some(outbox) = self.close(request_id) {
            // A reader that is behind sees its stream end without the last event.
            let Failure { message, by_grammar, .. } = failure;
            let _ = outbox.channel.try_send(Event::Failed { message, by_grammar });
        }
    }

    /// Tells a request's observer how it ended.
    fn end(&mut self, request_id: u64, how: Ended) {
        if let Some(open) = self.open.get_mut(&request_id) {
            open.end(how, Instant::now());
        }
    }

    /// Forgets a request and frees what it held; answers what is left of it to send.
    fn close(&mut self, request_id: u64) -> Option<Outbox> {
        let open = self.open.remove(&request_id)?;
        for choice in &open.choices {
            self.scheduler.finish(choice.sequence);
            self.owners.remove(&choice.sequence);
        }
        drop(open.place);
        Some(open.outbox)
    }

    /// The model is broken: everybody is told, and nobody waits for anything.
    fn bury(mut self) {
        let message = "the engine has failed and must be started again";
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
        let open: Vec<u64> = self.open.keys().copied().collect();
        open.into_iter().for_each(|id| self.fail(id, message.to_string().into()));
        self.publish();
    }

    fn publish(&self) {
        let counters = &self.monitor.counters;
        let (used, _) = self.scheduler.blocks();
        set(&counters.blocks_used, used as u64);
        set(&counters.blocks_kept, self.scheduler.blocks_kept() as u64);
        set(&counters.sequences_running, self.scheduler.running() as u64);
        set(&counters.sequences_waiting, self.scheduler.waiting() as u64);
        let running = |o: &&Open| o.choices.iter().any(|c| self.scheduler.is_running(c.sequence));
        set(&counters.requests_running, self.open.values().filter(running).count() as u64);
        let reuse = self.scheduler.reuse();
        set(&counters.prefix_tokens_asked, reuse.asked);
        set(&counters.prefix_tokens_found, reuse.found);
        set(&counters.preempted, reuse.preempted);
    }
}

/// Runs what must not hurt more than the one request it is done for.
fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let internal = || "the engine met an internal error in this request".to_string().into();
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(internal()))
}

/// Without a branch per value, which would cost more than the sampling.
fn all_finite(row: &[f32]) -> bool {
    row.iter().fold(true, |so_far, l| so_far & l.is_finite())
}

//! Which sequences advance in a step, and which cache blocks they hold. Pure: no clock, no channel, no IO.
//!
//! Every step first takes one token of each sequence that decodes, then fills what is left of the step's budget with
//! chunks of prompts, running and waiting ones in one order: priority, then the tenant that was served least, then age.
//! A sequence that finds no free block pushes another one back into the queue; that one is computed again later from
//! its tokens, with the same result.
//!
//! Whole blocks are known by their content. A sequence that is admitted begins behind the known blocks of its
//! beginning, and promises those that it is about to compute: another one that needs a promised block next waits.

use std::sync::Arc;

use oxseek_model::{
    Batch, LogitRows,
    kv::{BLOCK_TOKENS, blocks_for},
};

use crate::{
    BlockPool,
    blocks::{Before, Content, Found, Node},
    tenants::Tenants,
};

/// Names a sequence; larger is younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// Bounds of a scheduler.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Most sequences that hold cache blocks.
    pub sequences_max: usize,
    /// Most rows of one step. At least `sequences_max`.
    pub step_tokens_max: usize,
    /// Most rows of logits of one step beside one per sequence: what prompts are scored with.
    pub score_rows_max: usize,
    /// Blocks of the cache. The longest sequence must fit alone.
    pub cache_blocks: usize,
    /// Begin behind what is in the cache already.
    pub reuse: bool,
}

/// A new sequence.
#[derive(Debug, Clone, Default)]
pub struct Arrival {
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How many others will fork from it when its prompt is done.
    pub forks: usize,
    /// Smaller goes first.
    pub priority: i32,
    /// Whom it is computed for.
    pub tenant: u64,
    /// Only sequences with the same salt share blocks.
    pub salt: Option<Arc<str>>,
    /// The form in which each block of the prompt is computed; 0 from its end on.
    pub forms: Arc<[u8]>,
    /// Logits of every row of the prompt are wanted. Nothing of it is taken from the cache then.
    pub score: bool,
}

/// What a sequence's rows of logits in a step are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The sequence.
    pub id: SequenceId,
    /// Position of the first row that has logits.
    pub position: usize,
    /// Rows that have logits, one after the other.
    pub rows: usize,
    /// The last of them is where the next token is drawn from.
    pub draw: bool,
}

/// How far a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tokens of the prompt that are in the cache.
    pub done: usize,
    /// Tokens of the prompt.
    pub total: usize,
    /// Tokens of the prompt that were in the cache when it was first admitted.
    pub cached: usize,
}

/// How much of the prompts was in the cache already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reuse {
    /// Tokens that were looked for.
    pub asked: u64,
    /// Tokens that were there.
    pub found: u64,
    /// Sequences that lost their place and are or were computed again.
    pub preempted: u64,
}

/// The sequences and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: BlockPool,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    waiting: Vec<Sequence>,
    tenants: Tenants,
    /// Rows per running sequence in the step that was planned.
    planned: Vec<(SequenceId, usize)>,
    reuse: Reuse,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// How many of `tokens` are in the cache.
    computed: usize,
    blocks: Vec<u32>,
    /// Names of its whole blocks, as far as they have one.
    nodes: Vec<Node>,
    /// Places kept for sequences that will fork from this one when its prompt is done.
    forks: usize,
    paused: bool,
    priority: i32,
    tenant: u64,
    salt: Option<Arc<str>>,
    forms: Arc<[u8]>,
    /// First position of the prompt whose logits are still wanted.
    unscored: Option<usize>,
    /// Tokens that were in the cache when it was first admitted.
    cached: Option<usize>,
    /// The block that it waits for.
    awaits: Option<(Content, SequenceId)>,
}

/// Who goes first.
type Rank = (i32, u64, SequenceId);

impl Sequence {
    fn new(id: SequenceId, arrival: Arrival) -> Self {
        Self {
            id,
            prompt_tokens: arrival.prompt.len(),
            tokens: arrival.prompt,
            computed: 0,
            blocks: Vec::new(),
            nodes: Vec::new(),
            forks: arrival.forks,
            paused: false,
            priority: arrival.priority,
            tenant: arrival.tenant,
            salt: arrival.salt,
            forms: arrival.forms,
            unscored: arrival.score.then_some(0),
            cached: None,
            awaits: None,
        }
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn decodes(&self) -> bool {
        self.pending() == 1 && self.computed >= self.prompt_tokens
    }

    /// The content of whole block `at` behind `nodes`.
    fn content(&self, at: usize, nodes: &[Node]) -> Option<Content> {
        let before = match at.checked_sub(1) {
            None => Before::Start(self.salt.clone()),
            Some(last) => Before::Block(*nodes.get(last)?),
        };
        let tokens = self.tokens.get(at * BLOCK_TOKENS..(at + 1) * BLOCK_TOKENS)?;
        Content::new(before, self.forms.get(at).copied().unwrap_or(0), tokens)
    }
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            pool: BlockPool::new(limits.cache_blocks),
            running: Vec::new(),
            waiting: Vec::new(),
            tenants: Tenants::default(),
            planned: Vec::new(),
            reuse: Reuse::default(),
        }
    }

    /// Queues a new sequence.
    pub fn submit(&mut self, id: SequenceId, arrival: Arrival) {
        self.tenants.enter(arrival.tenant);
        self.waiting.push(Sequence::new(id, arrival));
    }

    /// Plans a step into `batch`, and the sequences that get rows of logits, in that order, into `wanted`.
    pub fn plan(&mut self, batch: &mut Batch, wanted: &mut Vec<Wanted>) {
        batch.clear();
        wanted.clear();
        self.planned.clear();
        let mut step =
            Step { rows: self.limits.step_tokens_max, score_rows: self.limits.score_rows_max, batch, wanted };
        self.find_blocks_to_decode();
        for at in 0..self.running.len() {
            if self.running[at].decodes() && !self.running[at].paused {
                self.add_rows(at, &mut step);
            }
        }
        self.plan_prompts(&mut step);
    }

    /// Fills what is left of the step with chunks of prompts.
    fn plan_prompts(&mut self, step: &mut Step<'_>) {
        let mut admitting = true;
        while step.rows > 0 {
            let running = self.next_running();
            let waiting = if admitting { self.next_waiting() } else { None };
            let admit = match (running, waiting) {
                (Some((rank, _)), Some((other, _))) => other < rank,
                (None, waiting) => waiting.is_some(),
                (Some(_), None) => false,
            };
            let at = match (admit, running, waiting) {
                (true, _, Some((_, at))) => {
                    // Nobody overtakes one that does not fit: a large one would else wait for ever.
                    admitting = self.admit(at);
                    if !admitting {
                        continue;
                    }
                    self.running.len() - 1
                }
                (_, Some((_, at)), _) => at,
                _ => return,
            };
            if !self.add_rows(at, step) {
                // Scored prompts share few rows of logits; others may still go on.
                self.planned.push((self.running[at].id, 0));
            }
        }
    }

    /// The next running sequence with a prompt to compute that is not in the step yet.
    fn next_running(&self) -> Option<(Rank, usize)> {
        let open = |s: &Sequence| !s.decodes() && !s.paused && s.pending() > 0;
        let planned = |s: &Sequence| self.planned.iter().any(|p| p.0 == s.id);
        let ranks = self.running.iter().enumerate().filter(|(_, s)| open(s) && !planned(s));
        ranks.map(|(at, s)| ((s.priority, self.tenants.served(s.tenant), s.id), at)).min()
    }

    /// The next waiting sequence that waits for nothing but a place. One that was pushed back goes before new ones.
    fn next_waiting(&mut self) -> Option<(Rank, usize)> {
        loop {
            let open = |s: &Sequence| !s.paused && !self.awaits_promise(s);
            let served = |s: &Sequence| if s.cached.is_some() { 0 } else { self.tenants.served(s.tenant) };
            let ranks = self.waiting.iter().enumerate().filter(|(_, s)| open(s));
            let next = ranks.map(|(at, s)| ((s.priority, served(s), s.id), at)).min()?;
            let (_, promise) = self.known_beginning(&self.waiting[next.1]);
            if promise.is_none() {
                return Some(next);
            }
            self.waiting[next.1].awaits = promise;
        }
    }

    /// Whether the block that a sequence waits for is still being computed.
    fn awaits_promise(&self, s: &Sequence) -> bool {
        let Some((content, by)) = &s.awaits else { return false };
        self.keeps_promises(*by) && self.pool.find(content).is_some_and(|f| f.promised_by == Some(*by))
    }

    fn keeps_promises(&self, id: SequenceId) -> bool {
        self.running.iter().any(|s| s.id == id && !s.paused)
    }

    /// The known blocks that a sequence begins with, and the promised one behind them if there is one. The last token
    /// is never among them, since its logits are wanted.
    fn known_beginning(&self, s: &Sequence) -> (Vec<Found>, Option<(Content, SequenceId)>) {
        let mut found = Vec::new();
        if !self.limits.reuse || s.unscored.is_some_and(|p| p < s.prompt_tokens) {
            return (found, None);
        }
        let mut nodes = Vec::new();
        for at in 0..(s.tokens.len() - 1) / BLOCK_TOKENS {
            let Some(content) = s.content(at, &nodes) else { break };
            let Some(f) = self.pool.find(&content) else { break };
            if let Some(by) = f.promised_by {
                return (found, self.keeps_promises(by).then_some((content, by)));
            }
            nodes.push(f.node);
            found.push(f);
        }
        (found, None)
    }

    /// The planned step ran: its rows are in the cache.
    pub fn advance(&mut self) {
        for (id, rows) in std::mem::take(&mut self.planned) {
            let Some(at) = self.running.iter().position(|s| s.id == id) else { continue };
            let s = &mut self.running[at];
            self.tenants.charge(s.tenant, rows);
            let whole = s.computed / BLOCK_TOKENS;
            s.computed += rows;
            if let Some(unscored) = &mut s.unscored {
                *unscored = s.computed.max(*unscored);
            }
            if self.limits.reuse {
                (whole..self.running[at].computed / BLOCK_TOKENS).for_each(|block| self.settle(at, block));
            }
        }
    }

    /// Block `block` of a sequence is whole and computed: others may have it. If there is one like it already, the
    /// sequence goes on with that one.
    fn settle(&mut self, at: usize, block: usize) {
        let s = &mut self.running[at];
        if self.pool.fulfil(s.blocks[block]) {
            return;
        }
        let Some(content) = s.content(block, &s.nodes) else { return };
        let own = s.blocks[block];
        match self.pool.find(&content) {
            Some(found) if found.promised_by.is_none() && found.block != own => {
                self.pool.share(found.block);
                self.pool.release(own);
                s.blocks[block] = found.block;
                s.nodes.truncate(block);
                s.nodes.push(found.node);
            }
            Some(found) => {
                s.nodes.truncate(block);
                s.nodes.push(found.node);
            }
            None => {
                let node = self.pool.know(own, content, s.nodes.get(block).copied(), None);
                s.nodes.truncate(block);
                s.nodes.push(node);
            }
        }
    }

    /// Sequences of the planned step.
    pub fn planned(&self) -> impl Iterator<Item = SequenceId> {
        self.planned.iter().filter(|p| p.1 > 0).map(|&(id, _)| id)
    }

    /// How far a sequence is; None when it does not run.
    pub fn progress(&self, id: SequenceId) -> Option<Progress> {
        let s = self.running.iter().find(|s| s.id == id)?;
        let (done, total) = (s.computed.min(s.prompt_tokens), s.prompt_tokens);
        Some(Progress { done, total, cached: s.cached.unwrap_or(0) })
    }

    /// Adds a sampled token to a sequence.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        if let Some(s) = self.find(id) {
            s.tokens.push(token);
        }
    }

    /// Starts `child` with the tokens of `parent`, whose prompt is done. Whole blocks are shared; answers the block to
    /// copy, `(from, to)`, when the last one is not whole.
    pub fn fork(&mut self, parent: SequenceId, child: SequenceId) -> Option<(u32, u32)> {
        let at = self.running.iter().position(|s| s.id == parent)?;
        let parent = &mut self.running[at];
        parent.forks = parent.forks.saturating_sub(1);
        let whole = parent.computed / BLOCK_TOKENS;
        let mut fork = Sequence {
            id: child,
            tokens: parent.tokens.clone(),
            prompt_tokens: parent.prompt_tokens,
            computed: parent.computed,
            blocks: Vec::new(),
            nodes: parent.nodes.iter().take(whole).copied().collect(),
            forks: 0,
            paused: false,
            priority: parent.priority,
            tenant: parent.tenant,
            salt: parent.salt.clone(),
            forms: Arc::clone(&parent.forms),
            unscored: parent.unscored,
            cached: parent.cached,
            awaits: None,
        };
        self.tenants.enter(fork.tenant);
        let part =
            parent.blocks.get(whole).copied().filter(|_| !parent.computed.is_multiple_of(BLOCK_TOKENS));
        let copy = match (part, part.and_then(|_| self.pool.take())) {
            (Some(_), None) => {
                // No block for the copy: it computes the prompt itself, later.
                fork.push_back();
                self.waiting.push(fork);
                return None;
            }
            (part, to) => part.zip(to),
        };
        fork.blocks.extend_from_slice(&self.running[at].blocks[..whole]);
        fork.blocks.iter().for_each(|&b| self.pool.share(b));
        fork.blocks.extend(copy.map(|(_, to)| to));
        self.running.push(fork);
        copy
    }

    /// Ends a sequence, wherever it is, and gives its blocks back.
    pub fn finish(&mut self, id: SequenceId) {
        if let Some(at) = self.waiting.iter().position(|s| s.id == id) {
            self.tenants.leave(self.waiting.remove(at).tenant);
        }
        if let Some(at) = self.running.iter().position(|s| s.id == id) {
            let s = self.running.remove(at);
            self.tenants.leave(s.tenant);
            self.release(s.blocks);
        }
    }

    /// Ends a sequence that is broken: nobody may find what it computed or used.
    pub fn discard(&mut self, id: SequenceId) {
        if let Some(s) = self.running.iter().find(|s| s.id == id) {
            s.blocks.iter().for_each(|&b| self.pool.forget(b));
        }
        self.finish(id);
    }

    /// The last blocks first, so that a beginning stays longer than what followed it.
    fn release(&mut self, blocks: Vec<u32>) {
        blocks.into_iter().rev().for_each(|b| self.pool.release(b));
    }

    /// Keeps a sequence out of the steps, or lets it in again. It keeps its blocks until somebody needs them.
    pub fn pause(&mut self, id: SequenceId, paused: bool) {
        if let Some(s) = self.find(id) {
            s.paused = paused;
        }
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Blocks that sequences hold, and blocks in all.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.total() - self.pool.free(), self.pool.total())
    }

    /// Blocks that no sequence holds and whose rows are kept.
    pub fn blocks_kept(&self) -> usize {
        self.pool.idle()
    }

    /// What the cache saved.
    pub fn reuse(&self) -> Reuse {
        self.reuse
    }

    /// A free block for a trial; it comes back with [`Self::take_back`].
    pub fn lend_block(&mut self) -> Option<u32> {
        self.pool.take()
    }

    /// The trial is over.
    pub fn take_back(&mut self, block: u32) {
        self.pool.release(block);
    }

    /// Whether a sequence has left the queue.
    pub fn is_running(&self, id: SequenceId) -> bool {
        self.running.iter().any(|s| s.id == id)
    }

    fn find(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running.iter_mut().chain(&mut self.waiting).find(|s| s.id == id)
    }

    /// Makes sure that every sequence that decodes has a block for its next token.
    fn find_blocks_to_decode(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let s = &self.running[at];
            let needs = s.decodes() && !s.paused && blocks_for(s.tokens.len()) > s.blocks.len();
            if !needs {
                at += 1;
            } else if let Some(block) = self.pool.take() {
                self.running[at].blocks.push(block);
                at += 1;
            } else {
                // May be this one itself. Those before it have what they need, so looking again is cheap.
                self.preempt_one();
                at = 0;
            }
        }
    }

    /// Sends a running sequence back to the queue: a paused one, else of those that matter least the one that came
    /// last. The first one of those that matter most is then never sent back while others run, so that there is always
    /// progress.
    fn preempt_one(&mut self) {
        let paused = self.running.iter().rposition(|s| s.paused);
        let least = || self.running.iter().enumerate().max_by_key(|(_, s)| s.priority).map(|(at, _)| at);
        let Some(at) = paused.or_else(least) else { return };
        let mut s = self.running.remove(at);
        self.reuse.preempted += 1;
        self.release(std::mem::take(&mut s.blocks));
        s.push_back();
        self.waiting.push(s);
    }

    /// Moves a waiting sequence to the end of the running ones, if there is room for all of its tokens and forks.
    /// Paused ones make room: who waits must not wait for somebody else's reader.
    fn admit(&mut self, at: usize) -> bool {
        let places = |s: &[Sequence], paused: bool| -> usize {
            s.iter().filter(|s| paused || !s.paused).map(|s| 1 + s.forks).sum()
        };
        let own = 1 + self.waiting[at].forks;
        if places(&self.running, false) + own > self.limits.sequences_max {
            return false;
        }
        let (known, blocks) = loop {
            let next = &self.waiting[at];
            let (known, _) = self.known_beginning(next);
            let blocks = blocks_for(next.tokens.len()) - known.len();
            let idle = known.iter().filter(|f| self.pool.is_idle(f.block)).count();
            let place = places(&self.running, true) + own <= self.limits.sequences_max;
            if place && blocks <= self.pool.free() - idle {
                break (known, blocks);
            }
            if !self.running.iter().any(|s| s.paused) {
                return false;
            }
            // Goes to the end of those that wait: `at` stays this one's.
            self.preempt_one();
        };
        let mut s = self.waiting.remove(at);
        for found in &known {
            self.pool.share(found.block);
            s.blocks.push(found.block);
            s.nodes.push(found.node);
        }
        s.blocks.extend((0..blocks).map_while(|_| self.pool.take()));
        s.computed = known.len() * BLOCK_TOKENS;
        s.awaits = None;
        if s.cached.is_none() {
            s.cached = Some(s.computed);
            self.reuse.asked += s.tokens.len() as u64;
            self.reuse.found += s.computed as u64;
        }
        self.promise(&mut s, known.len());
        self.running.push(s);
        true
    }

    /// Says which whole blocks a sequence is going to compute, from block `from` on.
    fn promise(&mut self, s: &mut Sequence, from: usize) {
        if !self.limits.reuse {
            return;
        }
        for at in from..s.tokens.len() / BLOCK_TOKENS {
            let Some(content) = s.content(at, &s.nodes) else { return };
            let node = self.pool.know(s.blocks[at], content, None, Some(s.id));
            s.nodes.push(node);
        }
    }

    /// Adds rows of a running sequence to the step; false when none fit.
    fn add_rows(&mut self, at: usize, step: &mut Step<'_>) -> bool {
        let s = &self.running[at];
        let mut rows = s.pending().min(step.rows);
        // Rows up to `scored` need no logits, and so do all when the prompt is not scored.
        let scored = s.unscored.filter(|&p| p < s.prompt_tokens);
        let mut score = false;
        if let Some(scored) = scored {
            score = s.computed >= scored;
            rows = rows.min(if score { step.score_rows } else { scored - s.computed });
        }
        if rows == 0 {
            return false;
        }
        let end = s.computed + rows;
        let draw = end == s.tokens.len();
        let logits = match (score, draw) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::Last,
            (false, false) => LogitRows::None,
        };
        let blocks = &s.blocks[..blocks_for(end)];
        step.batch.push(&s.tokens[s.computed..end], s.computed, s.prompt_tokens, blocks, logits);
        let with_logits = if score { rows } else { usize::from(draw) };
        if with_logits > 0 {
            let position = end - with_logits;
            step.wanted.push(Wanted { id: s.id, position, rows: with_logits, draw });
        }
        if score {
            step.score_rows -= rows;
        }
        step.rows -= rows;
        self.planned.push((s.id, rows));
        true
    }
}

/// A step that is being planned.
struct Step<'a> {
    /// Rows that still fit.
    rows: usize,
    /// Rows of logits beside one per sequence that still fit.
    score_rows: usize,
    batch: &'a mut Batch,
    wanted: &'a mut Vec<Wanted>,
}

impl Sequence {
    /// Nothing of it is in the cache any more.
    fn push_back(&mut self) {
        self.computed = 0;
        self.nodes.clear();
        self.awaits = None;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn limits(sequences_max: usize, step_tokens_max: usize, cache_blocks: usize) -> SchedulerLimits {
        SchedulerLimits { sequences_max, step_tokens_max, score_rows_max: 5, cache_blocks, reuse: false }
    }

    fn scheduler(sequences_max: usize, step_tokens_max: usize, cache_blocks: usize) -> Scheduler {
        Scheduler::new(limits(sequences_max, step_tokens_max, cache_blocks))
    }

    fn reusing(sequences_max: usize, step_tokens_max: usize, cache_blocks: usize) -> Scheduler {
        let limits = limits(sequences_max, step_tokens_max, cache_blocks);
        Scheduler::new(SchedulerLimits { reuse: true, ..limits })
    }

    fn arrival(tokens: usize, forks: usize) -> Arrival {
        Arrival { prompt: vec![1; tokens], forks, ..Arrival::default() }
    }

    fn of(tenant: u64, tokens: usize) -> Arrival {
        Arrival { tenant, ..arrival(tokens, 0) }
    }

    /// One step; every sequence that gets logits grows by a token. Answers the rows of each sequence.
    fn step(s: &mut Scheduler) -> Vec<(u64, usize)> {
        let (mut batch, mut wanted) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut wanted);
        let rows = s.planned().map(|id| id.0).zip(batch.sequences.iter().map(|q| q.tokens.len())).collect();
        s.advance();
        wanted.iter().filter(|w| w.draw).for_each(|w| s.append(w.id, 7));
        rows
    }

    #[test]
    fn a_long_prompt_is_cut_and_does_not_stop_the_others() {
        let mut s = scheduler(4, 10, 100);
        s.submit(SequenceId(1), arrival(3, 0));
        s.submit(SequenceId(2), arrival(25, 0));
        assert_eq!(step(&mut s), [(1, 3), (2, 7)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 9)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 9)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 1)]);
    }

    #[test]
    fn sequences_wait_for_a_place_and_for_the_places_of_forks() {
        let mut s = scheduler(3, 100, 100);
        s.submit(SequenceId(1), arrival(2, 1));
        s.submit(SequenceId(2), arrival(2, 1));
        assert_eq!(step(&mut s), [(1, 2)]);
        assert_eq!((s.running(), s.waiting()), (1, 1));
        s.finish(SequenceId(1));
        assert_eq!(step(&mut s), [(2, 2)]);
    }

    #[test]
    fn the_last_one_is_sent_back_when_blocks_run_out_and_comes_again() {
        let mut s = scheduler(2, 200, 3);
        s.submit(SequenceId(1), arrival(64, 0));
        s.submit(SequenceId(2), arrival(64, 0));
        assert_eq!(step(&mut s), [(1, 64), (2, 64)]);
        // Both need a second block; there is one.
        assert_eq!(step(&mut s), [(1, 1)]);
        assert_eq!((s.running(), s.waiting(), s.blocks()), (1, 1, (2, 3)));
        s.finish(SequenceId(1));
        assert_eq!(step(&mut s), [(2, 65)]);
    }

    #[test]
    fn a_paused_sequence_holds_nobody_up() {
        let mut s = scheduler(2, 200, 3);
        s.submit(SequenceId(1), arrival(64, 0));
        s.submit(SequenceId(2), arrival(64, 0));
        step(&mut s);
        s.pause(SequenceId(1), true);
        // The paused one stays in the cache while there is room, and goes when there is none.
        for _ in 0..64 {
            assert_eq!(step(&mut s), [(2, 1)]);
        }
        assert_eq!(s.running(), 2);
        step(&mut s);
        assert_eq!((s.running(), s.is_running(SequenceId(2))), (1, true));
        s.finish(SequenceId(2));
        assert_eq!(step(&mut s), []);
        s.pause(SequenceId(1), false);
        assert_eq!(step(&mut s), [(1, 65)]);
    }

    #[test]
    fn a_paused_sequence_keeps_no_place_that_another_waits_for() {
        let mut s = scheduler(3, 200, 100);
        (1..=2).for_each(|id| s.submit(SequenceId(id), arrival(10, 0)));
        assert_eq!(step(&mut s), [(1, 10), (2, 10)]);
        (1..=2).for_each(|id| s.pause(SequenceId(id), true));
        // There is a place for one; the second one needs a paused one's.
        s.submit(SequenceId(3), arrival(20, 0));
        assert_eq!(step(&mut s), [(3, 20)]);
        assert_eq!((s.running(), s.waiting()), (3, 0));
        s.submit(SequenceId(4), arrival(30, 0));
        assert_eq!(step(&mut s), [(3, 1), (4, 30)]);
        assert_eq!((s.is_running(SequenceId(1)), s.is_running(SequenceId(2))), (true, false));
        // Nobody is sent away for one that would not fit even so.
        s.submit(SequenceId(5), arrival(5, 2));
        assert_eq!(step(&mut s), [(3, 1), (4, 1)]);
        assert_eq!((s.running(), s.waiting()), (3, 2));
        // It goes on where it was: ten tokens and the one that it was given.
        s.pause(SequenceId(2), false);
        assert_eq!(step(&mut s), [(3, 1), (4, 1), (2, 11)]);
    }

    #[test]
    fn a_fork_shares_whole_blocks_and_copies_the_last() {
        let mut s = scheduler(3, 200, 10);
        s.submit(SequenceId(1), arrival(100, 2));
        let (mut batch, mut wanted) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut wanted);
        s.advance();
        assert!(s.fork(SequenceId(1), SequenceId(2)).is_some());
        assert_eq!(s.blocks().0, 3);
        s.finish(SequenceId(1));
        assert_eq!(s.blocks().0, 2);
        s.finish(SequenceId(2));
        assert_eq!(s.blocks().0, 0);
    }

    #[test]
    fn a_beginning_that_many_share_is_computed_once() {
        let mut s = reusing(8, 100, 50);
        for id in 1..=4 {
            let prompt = [vec![1; 200], vec![id as u32 + 1; 10]].concat();
            s.submit(SequenceId(id), Arrival { prompt, ..Arrival::default() });
        }
        // Another one does not wait for them.
        s.submit(SequenceId(5), Arrival { prompt: vec![9; 20], ..Arrival::default() });
        assert_eq!(step(&mut s), [(1, 100)]);
        assert_eq!(step(&mut s), [(1, 100)]);
        // 192 tokens are there; the last 18 are everyone's own.
        assert_eq!(step(&mut s), [(1, 10), (2, 18), (3, 18), (4, 18), (5, 20)]);
        assert_eq!(s.reuse(), Reuse { asked: 4 * 210 + 20, found: 3 * 192, preempted: 0 });
        assert_eq!(s.progress(SequenceId(3)), Some(Progress { done: 210, total: 210, cached: 192 }));
        assert_eq!(s.blocks().0, 3 + 4 + 1);
        (1..=5).for_each(|id| s.finish(SequenceId(id)));
        assert_eq!((s.blocks(), s.blocks_kept()), ((0, 50), 3));
        // Later too, and the last token is computed in any case.
        s.submit(SequenceId(6), arrival(192, 0));
        assert_eq!(step(&mut s), [(6, 64)]);
    }

    #[test]
    fn salts_and_forms_keep_blocks_apart() {
        let mut s = reusing(8, 1000, 50);
        let salted = |salt: Option<&str>| Arrival { salt: salt.map(Into::into), ..arrival(129, 0) };
        let formed = |forms: &[u8]| Arrival { forms: forms.into(), ..arrival(129, 0) };
        let arrivals = [
            (salted(None), 129),
            (salted(Some("a")), 129),
            (salted(Some("b")), 129),
            (salted(Some("a")), 1),
            (formed(&[64, 64]), 129),
            (formed(&[64, 3]), 65),
            (formed(&[64, 64, 9]), 1),
        ];
        for (id, (arrival, rows)) in arrivals.into_iter().enumerate() {
            s.submit(SequenceId(id as u64), arrival);
            assert_eq!(step(&mut s), [(id as u64, rows)]);
            s.finish(SequenceId(id as u64));
        }
    }

    #[test]
    fn who_waits_for_a_promise_goes_on_when_it_is_not_kept() {
        let mut s = reusing(8, 64, 50);
        s.submit(SequenceId(1), arrival(200, 0));
        s.submit(SequenceId(2), arrival(200, 0));
        assert_eq!(step(&mut s), [(1, 64)]);
        assert_eq!((s.running(), s.waiting()), (1, 1));
        // A paused one keeps no promise.
        s.pause(SequenceId(1), true);
        assert_eq!(step(&mut s), [(2, 64)]);
        s.finish(SequenceId(1));
        assert_eq!(step(&mut s), [(2, 64)]);
        // A broken one leaves nothing to be found, not even what it found itself.
        s.discard(SequenceId(2));
        assert_eq!((s.blocks().0, s.blocks_kept()), (0, 0));
        s.submit(SequenceId(3), arrival(65, 0));
        assert_eq!(step(&mut s), [(3, 64)]);
    }

    #[test]
    fn tenants_take_turns_and_priority_goes_first() {
        let mut s = scheduler(8, 10, 100);
        (1..=3).for_each(|id| s.submit(SequenceId(id), of(1, 20)));
        s.submit(SequenceId(4), of(2, 25));
        assert_eq!(step(&mut s), [(1, 10)]);
        assert_eq!(step(&mut s), [(4, 10)]);
        assert_eq!(step(&mut s), [(1, 10)]);
        s.submit(SequenceId(5), Arrival { priority: -1, ..of(1, 9) });
        assert_eq!(step(&mut s), [(1, 1), (5, 9)]);
    }

    #[test]
    fn a_scored_prompt_gets_logits_for_each_row_once() {
        let mut s = reusing(4, 50, 10);
        s.submit(SequenceId(9), arrival(70, 0));
        step(&mut s);
        s.submit(SequenceId(1), Arrival { score: true, ..arrival(12, 0) });
        s.submit(SequenceId(2), Arrival { score: true, ..arrival(70, 0) });
        let (mut batch, mut wanted) = (Batch::default(), Vec::new());
        let mut scored: HashMap<u64, Vec<usize>> = HashMap::new();
        for turn in 0..40 {
            s.plan(&mut batch, &mut wanted);
            assert_eq!(wanted.iter().map(|w| w.rows).sum::<usize>(), batch.logit_rows());
            assert!(batch.logit_rows() <= 4 + 5);
            for w in &wanted {
                scored.entry(w.id.0).or_default().extend(w.position..w.position + w.rows);
            }
            s.advance();
            wanted.iter().filter(|w| w.draw).for_each(|w| s.append(w.id, 7));
            if turn == 7 {
                // In the middle of the second one.
                s.running.iter().for_each(|s| assert!(s.computed > 0));
                s.preempt_one();
            }
        }
        for (id, prompt) in [(1, 12), (2, 70)] {
            assert_eq!(scored[&id][..prompt], (0..prompt).collect::<Vec<_>>());
        }
    }

    /// What a row of the cache is made from: its salt, its whole history and its form.
    type Row = (Option<Arc<str>>, Vec<u32>, u8);

    #[derive(Debug, Clone)]
    enum Move {
        Submit { tokens: usize, forks: usize, kind: u32, who: u64, score: bool },
        Step { fails: bool },
        Finish(usize),
        Pause(usize, bool),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let submit = (1usize..200, 0usize..3, 0u32..6, 0u64..3, prop::bool::weighted(0.1));
        let one = prop_oneof![
            2 => submit.prop_map(|(tokens, forks, kind, who, score)| {
                Move::Submit { tokens, forks, kind, who, score }
            }),
            8 => prop::bool::weighted(0.03).prop_map(|fails| Move::Step { fails }),
            1 => (0usize..20).prop_map(Move::Finish),
            1 => (0usize..20, any::<bool>()).prop_map(|(i, p)| Move::Pause(i, p)),
        ];
        prop::collection::vec(one, 1..120)
    }

    /// Prompts that share beginnings of many lengths.
    fn text(kind: u32, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|p| if p < 70 * (kind % 3) { 1 } else { 2 + kind }).collect()
    }

    /// Forms as a model could have them: they depend on where the prompt ends.
    fn forms(tokens: usize) -> Arc<[u8]> {
        let whole = tokens / 100 * 100;
        (0..tokens.div_ceil(64)).map(|b| whole.saturating_sub(b * 64).min(64) as u8).collect()
    }

    proptest! {
        #[test]
        fn no_step_breaks_a_bound_and_no_block_is_lost_or_mixed_up(moves in moves(), reuse: bool) {
            let (places, budget, blocks) = (4, 50, 8);
            let mut s = Scheduler::new(SchedulerLimits { reuse, ..limits(places, budget, blocks) });
            let mut cache: Vec<Vec<Option<Row>>> = vec![vec![None; 64]; blocks];
            let mut alive: Vec<(SequenceId, usize)> = Vec::new();
            let mut next = 0;
            for m in moves {
                match m {
                    Move::Submit { tokens, forks, kind, who, score } => {
                        next += 1;
                        alive.push((SequenceId(next), forks));
                        s.submit(SequenceId(next), Arrival {
                            prompt: text(kind, tokens),
                            forks,
                            priority: (kind / 5) as i32,
                            tenant: who,
                            salt: (who == 2).then(|| "two".into()),
                            forms: forms(tokens),
                            score,
                        });
                    }
                    Move::Finish(i) if !alive.is_empty() => s.finish(alive.remove(i % alive.len()).0),
                    Move::Pause(i, p) if !alive.is_empty() => s.pause(alive[i % alive.len()].0, p),
                    Move::Step { fails } => {
                        let (mut batch, mut wanted) = (Batch::default(), Vec::new());
                        s.plan(&mut batch, &mut wanted);
                        prop_assert!(batch.tokens.len() <= budget && s.running() <= places);
                        prop_assert!(batch.logit_rows() <= places + 5);
                        // No block that is written to belongs to two sequences of the step.
                        let mut written: Vec<u32> =
                            batch.sequences.iter().flat_map(|q| {
                                batch.blocks[q.blocks.clone()][q.start / BLOCK_TOKENS..].to_vec()
                            }).collect();
                        written.sort_unstable();
                        let count = written.len();
                        written.dedup();
                        prop_assert_eq!(count, written.len());
                        let ids: Vec<SequenceId> = s.planned().collect();
                        for (q, id) in batch.sequences.iter().zip(&ids) {
                            prop_assert_eq!(q.blocks.len(), blocks_for(q.start + q.tokens.len()));
                            let own = s.running.iter().find(|s| s.id == *id).expect("it runs");
                            let table = &batch.blocks[q.blocks.clone()];
                            for p in 0..q.start + q.tokens.len() {
                                let form = own.forms.get(p / 64).copied().unwrap_or(0);
                                let form = u8::from(p % 64 < usize::from(form));
                                let row = (own.salt.clone(), own.tokens[..=p].to_vec(), form);
                                let place = &mut cache[table[p / 64] as usize][p % 64];
                                if p < q.start {
                                    prop_assert_eq!(place.as_ref(), Some(&row), "position {} of {:?}", p, id);
                                } else {
                                    *place = if fails { None } else { Some(row) };
                                }
                            }
                        }
                        if fails {
                            for id in ids {
                                s.finish(id);
                                alive.retain(|a| a.0 != id);
                            }
                            continue;
                        }
                        s.advance();
                        for id in wanted.iter().filter(|w| w.draw).map(|w| w.id) {
                            let at = alive.iter().position(|a| a.0 == id).expect("alive");
                            for _ in 0..std::mem::take(&mut alive[at].1) {
                                next += 1;
                                if let Some((from, to)) = s.fork(id, SequenceId(next)) {
                                    cache[to as usize] = cache[from as usize].clone();
                                }
                                s.append(SequenceId(next), 8);
                                alive.push((SequenceId(next), 0));
                            }
                            s.append(id, 7);
                        }
                        // Nothing may grow past what fits alone.
                        let long: Vec<_> = s.running.iter().chain(&s.waiting)
                            .filter(|q| q.tokens.len() >= blocks * BLOCK_TOKENS).map(|q| q.id).collect();
                        for id in long {
                            s.finish(id);
                            alive.retain(|a| a.0 != id);
                        }
                    }
                    _ => {}
                }
            }
            for (id, _) in &alive {
                s.pause(*id, false);
            }
            // Everybody gets a turn in the end.
            for _ in 0..2000 {
                let Some(first) = s.running.first().map(|q| q.id) else {
                    if s.waiting() == 0 { break }
                    prop_assert!(!step(&mut s).is_empty(), "nobody runs and nobody is admitted");
                    continue;
                };
                s.finish(first);
            }
            prop_assert_eq!((s.running(), s.waiting(), s.blocks().0), (0, 0, 0));
            prop_assert!(reuse || s.blocks_kept() == 0);
        }
    }
}

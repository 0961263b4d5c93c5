//! Which sequences advance in a step, and which cache blocks they hold. Pure: no clock, no channel, no IO.
//!
//! Every step first takes one token of each sequence that decodes, then fills what is left of the step's budget with
//! chunks of prompts, running and waiting ones in one order: priority, then the tenant that was served least, then age.
//! A sequence that finds no free block pushes another one back into the queue; that one is computed again later from
//! its tokens, with the same result.
//!
//! Whole blocks are known by their content. A sequence that is admitted begins behind the known blocks of its
//! beginning, and promises those that it is about to compute: another one that needs a promised block next waits.
//! Behind its known blocks it begins with a copy of the rows that it has in common with another block there.

use std::sync::Arc;

use oxseek_model::{
    Batch, LogitRows,
    kv::{BLOCK_TOKENS, blocks_for},
};

use crate::{
    BlockPool,
    blocks::{Before, Content, Found, Node, Part, common_rows},
    tenants::Tenants,
};

/// Fewer rows are computed again rather than copied: every prompt begins with the same few tokens.
const COPIED_ROWS_MIN: usize = 8;
/// For fewer rows than these nobody waits for the sequence that is about to compute them.
const AWAITED_ROWS_MIN: usize = BLOCK_TOKENS / 2;

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
    /// How many rows of each block of the prompt are computed in the form of prompts; 0 from its end on.
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
    /// What is to be copied before the step that was planned, in this order.
    copies: Vec<RowCopy>,
    reuse: Reuse,
}

/// Rows that a sequence begins with.
#[derive(Debug, Clone, Copy)]
struct RowCopy {
    id: SequenceId,
    from: u32,
    to: u32,
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
    /// What it waits for.
    awaits: Option<Awaited>,
    /// The known block that it has copied rows of.
    copied: Option<(u32, Node)>,
}

/// What a running sequence is about to compute.
#[derive(Debug)]
struct Awaited {
    by: SequenceId,
    /// It is there when this many of its tokens are in the cache,
    position: usize,
    /// or when this block, which is whole, is not promised any more.
    block: Option<Content>,
}

/// What a waiting sequence begins with, or waits for.
#[derive(Debug, Default)]
struct Beginning {
    blocks: Vec<Found>,
    /// Rows to copy behind these blocks.
    part: Option<Part>,
    awaits: Option<Awaited>,
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
            copied: None,
        }
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Its own place and those of its forks.
    fn places(&self) -> usize {
        1 + self.forks
    }

    fn decodes(&self) -> bool {
        self.pending() == 1 && self.computed >= self.prompt_tokens
    }

    /// The content of whole block `at` behind `nodes`.
    fn content(&self, at: usize, nodes: &[Node]) -> Option<Content> {
        let tokens = self.tokens.get(at * BLOCK_TOKENS..(at + 1) * BLOCK_TOKENS)?;
        Some(Content::new(self.before(at, nodes)?, self.form(at), tokens))
    }

    /// What comes before block `at` behind `nodes`.
    fn before(&self, at: usize, nodes: &[Node]) -> Option<Before> {
        match at.checked_sub(1) {
            None => Some(Before::Start(self.salt.clone())),
            Some(last) => Some(Before::Block(*nodes.get(last)?)),
        }
    }

    fn form(&self, block: usize) -> u8 {
        self.forms.get(block).copied().unwrap_or(0)
    }

    /// The form and the tokens of block `at`, as far as there are tokens before `end`.
    fn rows(&self, at: usize, end: usize) -> (u8, &[u32]) {
        let end = end.min((at + 1) * BLOCK_TOKENS).min(self.tokens.len());
        (self.form(at), self.tokens.get(at * BLOCK_TOKENS..end).unwrap_or_default())
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
            copies: Vec::new(),
            reuse: Reuse::default(),
        }
    }

    /// Queues a new sequence.
    pub fn submit(&mut self, id: SequenceId, arrival: Arrival) {
        self.tenants.enter(arrival.tenant);
        self.waiting.push(Sequence::new(id, arrival));
    }

    /// Plans a step into `batch`, and the sequences that get rows of logits, in that order, into `wanted`. The step
    /// needs what [`Self::copies`] then says.
    pub fn plan(&mut self, batch: &mut Batch, wanted: &mut Vec<Wanted>) {
        batch.clear();
        wanted.clear();
        self.planned.clear();
        self.copies.clear();
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
            let awaits = self.beginning(&self.waiting[next.1]).awaits;
            if awaits.is_none() {
                return Some(next);
            }
            self.waiting[next.1].awaits = awaits;
        }
    }

    /// Whether what a sequence waits for is still being computed.
    fn awaits_promise(&self, s: &Sequence) -> bool {
        let Some(Awaited { by, position, block }) = &s.awaits else { return false };
        let promised = |c| self.pool.find(c).is_some_and(|f| f.promised_by == Some(*by));
        self.keeps_promises(*by)
            && self.running.iter().any(|r| r.id == *by && r.computed < *position)
            && block.as_ref().is_none_or(promised)
    }

    fn keeps_promises(&self, id: SequenceId) -> bool {
        self.running.iter().any(|s| s.id == id && !s.paused)
    }

    /// What a sequence begins with, or waits for. Its last token is never among it, since its logits are wanted.
    fn beginning(&self, s: &Sequence) -> Beginning {
        let mut beginning = Beginning::default();
        if !self.limits.reuse || s.unscored.is_some_and(|p| p < s.prompt_tokens) {
            return beginning;
        }
        let mut nodes = Vec::new();
        for at in 0..(s.tokens.len() - 1) / BLOCK_TOKENS {
            let Some(content) = s.content(at, &nodes) else { break };
            let Some(f) = self.pool.find(&content) else { break };
            if let Some(by) = f.promised_by {
                if self.keeps_promises(by) {
                    let position = (at + 1) * BLOCK_TOKENS;
                    beginning.awaits = Some(Awaited { by, position, block: Some(content) });
                    return beginning;
                }
                break;
            }
            nodes.push(f.node);
            beginning.blocks.push(f);
        }
        self.find_part(s, &nodes, &mut beginning);
        beginning
    }

    /// Looks for rows in common with the block that follows `nodes` in a sequence: in known blocks, and in those of
    /// running sequences, which may be about to compute them.
    fn find_part(&self, s: &Sequence, nodes: &[Node], beginning: &mut Beginning) {
        let at = nodes.len();
        let Some(before) = s.before(at, nodes) else { return };
        // One row of the block is left to compute, since a block that it has promised is settled when that ends.
        let own = s.rows(at, (s.tokens.len() - 1).min((at + 1) * BLOCK_TOKENS - 1));
        let known = self.pool.find_part(&before, own.0, own.1);
        let mut best = known.unwrap_or(Part { block: 0, rows: 0, node: None });
        let mut awaited = (0, None);
        for r in self.running.iter().filter(|r| r.before(at, &r.nodes).as_ref() == Some(&before)) {
            let common = common_rows(own, r.rows(at, r.tokens.len()));
            let rows = common.min(r.computed.saturating_sub(at * BLOCK_TOKENS));
            if rows > best.rows {
                best = Part { block: r.blocks[at], rows, node: None };
            }
            if !r.paused && rows < common && common > awaited.0 {
                let position = at * BLOCK_TOKENS + common;
                awaited = (common, Some(Awaited { by: r.id, position, block: None }));
            }
        }
        if awaited.0 >= best.rows + AWAITED_ROWS_MIN {
            beginning.awaits = awaited.1;
        }
        beginning.part = Some(best).filter(|p| p.rows >= COPIED_ROWS_MIN);
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

    /// The planned step failed: what was to be copied may not be there.
    pub fn step_failed(&mut self) {
        for RowCopy { id, .. } in std::mem::take(&mut self.copies) {
            if let Some(s) = self.running.iter_mut().find(|s| s.id == id) {
                s.computed = s.computed / BLOCK_TOKENS * BLOCK_TOKENS;
            }
        }
    }

    /// Block `block` of a sequence is whole and computed: others may have it. If there is one like it already, the
    /// sequence goes on with that one. If another sequence has promised one like it, nobody waits for that any more.
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
            found => {
                if let Some(promised) = found.filter(|f| f.block != own) {
                    self.pool.forget(promised.block);
                }
                let node = found.map(|f| f.node).or_else(|| s.nodes.get(block).copied());
                let node = self.pool.know(own, content, node, None);
                s.nodes.truncate(block);
                s.nodes.push(node);
            }
        }
    }

    /// Blocks to copy before the planned step runs, `(from, to)`, in this order.
    pub fn copies(&self) -> impl Iterator<Item = (u32, u32)> {
        self.copies.iter().map(|c| (c.from, c.to)).filter(|(from, to)| from != to)
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
            copied: parent.copied,
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
            let mut s = self.running.remove(at);
            self.tenants.leave(s.tenant);
            self.release(&mut s);
        }
    }

    /// Ends a sequence that is broken: nobody may find what it computed or used.
    pub fn discard(&mut self, id: SequenceId) {
        if let Some(s) = self.running.iter_mut().find(|s| s.id == id) {
            s.computed = 0;
            s.blocks.iter().for_each(|&b| self.pool.forget(b));
            if let Some((block, node)) = s.copied {
                self.pool.forget_node(block, node);
            }
        }
        self.finish(id);
    }

    /// Gives a sequence's blocks back: the last ones first, so that a beginning stays longer than what followed it.
    fn release(&mut self, s: &mut Sequence) {
        self.keep_part(s);
        std::mem::take(&mut s.blocks).into_iter().rev().for_each(|b| self.pool.release(b));
    }

    /// The rows of a sequence's last block, which is not whole, may be found, unless others know them all.
    fn keep_part(&mut self, s: &Sequence) {
        let at = s.computed / BLOCK_TOKENS;
        let (form, tokens) = s.rows(at, s.computed);
        if !self.limits.reuse || tokens.len() < COPIED_ROWS_MIN {
            return;
        }
        let Some(before) = s.before(at, &s.nodes) else { return };
        if self.pool.find_part(&before, form, tokens).is_none_or(|p| p.rows < tokens.len()) {
            self.pool.know(s.blocks[at], Content::new(before, form, tokens), None, None);
        }
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
        self.release(&mut s);
        s.push_back();
        self.waiting.push(s);
    }

    /// Moves a waiting sequence to the end of the running ones, if there is room for all of its tokens and forks.
    /// Paused ones make room: who waits must not wait for somebody else's reader.
    fn admit(&mut self, at: usize) -> bool {
        let own = self.waiting[at].places();
        let kept: usize = self.running.iter().filter(|s| !s.paused).map(Sequence::places).sum();
        if kept + own > self.limits.sequences_max {
            return false;
        }
        let (beginning, blocks) = loop {
            let next = &self.waiting[at];
            let beginning = self.beginning(next);
            let blocks = blocks_for(next.tokens.len()) - beginning.blocks.len();
            let idle = beginning.blocks.iter().filter(|f| self.pool.is_idle(f.block)).count();
            let places: usize = self.running.iter().map(Sequence::places).sum();
            if places + own <= self.limits.sequences_max && blocks <= self.pool.free() - idle {
                break (beginning, blocks);
            }
            if !self.running.iter().any(|s| s.paused) {
                return false;
            }
            // Goes to the end of those that wait: `at` stays this one's.
            self.preempt_one();
        };
        let mut s = self.waiting.remove(at);
        self.begin(&mut s, &beginning, blocks);
        self.running.push(s);
        true
    }

    /// Gives a sequence its beginning and `blocks` more blocks.
    fn begin(&mut self, s: &mut Sequence, beginning: &Beginning, blocks: usize) {
        let whole = beginning.blocks.len();
        for found in &beginning.blocks {
            self.pool.share(found.block);
            s.blocks.push(found.block);
            s.nodes.push(found.node);
        }
        s.computed = whole * BLOCK_TOKENS;
        if let Some(part) = beginning.part {
            self.pool.touch(part.block);
        }
        s.blocks.extend((0..blocks).map_while(|_| self.pool.take()));
        if let Some(part) = beginning.part {
            self.copy(s, part);
        }
        s.awaits = None;
        if s.cached.is_none() {
            s.cached = Some(s.computed);
            self.reuse.asked += s.tokens.len() as u64;
            self.reuse.found += s.computed as u64;
        }
        self.promise(s, whole);
    }

    /// Begins behind a copy of `part`. Its block may be taken for others by now, even for this one: nothing is written
    /// there before the copies of the step are made.
    fn copy(&mut self, s: &mut Sequence, part: Part) {
        let to = s.blocks[s.computed / BLOCK_TOKENS];
        s.computed += part.rows;
        s.copied = part.node.map(|node| (part.block, node));
        // Also when it is that block itself: should the step fail, its rows are not used.
        self.copies.push(RowCopy { id: s.id, from: part.block, to });
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
        self.copied = None;
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
        // 192 tokens are there in whole blocks, and 8 more to copy; the last 10 are everyone's own.
        assert_eq!(step(&mut s), [(1, 10), (2, 10), (3, 10), (4, 10), (5, 20)]);
        assert_eq!(s.reuse(), Reuse { asked: 4 * 210 + 20, found: 3 * 200, preempted: 0 });
        assert_eq!(s.progress(SequenceId(3)), Some(Progress { done: 210, total: 210, cached: 200 }));
        assert_eq!(s.blocks().0, 3 + 4 + 1);
        (1..=5).for_each(|id| s.finish(SequenceId(id)));
        // Each of them leaves what it had of its last block.
        assert_eq!((s.blocks(), s.blocks_kept()), ((0, 50), 3 + 4 + 1));
        // Later too, and the last token is computed in any case.
        s.submit(SequenceId(6), arrival(192, 0));
        assert_eq!(step(&mut s), [(6, 1)]);
        assert_eq!(s.progress(SequenceId(6)).map(|p| p.cached), Some(191));
    }

    /// One step, and what is copied for it.
    fn step_with_copies(s: &mut Scheduler) -> (Vec<(u64, usize)>, usize) {
        let rows = step(s);
        (rows, s.copies().count())
    }

    /// A common beginning, and more of its own.
    fn begins(common: usize, own: u32, tokens: usize) -> Arrival {
        Arrival { prompt: [vec![1; common], vec![own; tokens]].concat(), ..Arrival::default() }
    }

    /// What sequence 1 leaves in a cache of so many blocks.
    fn left_behind(cache_blocks: usize, arrival: Arrival) -> Scheduler {
        let mut s = reusing(2, 100, cache_blocks);
        s.submit(SequenceId(1), arrival);
        step(&mut s);
        s.finish(SequenceId(1));
        s
    }

    #[test]
    fn rows_of_a_block_that_is_not_whole_are_copied() {
        let mut s = reusing(8, 1000, 50);
        s.submit(SequenceId(1), begins(100, 2, 5));
        assert_eq!(step_with_copies(&mut s), (vec![(1, 105)], 0));
        // From one that runs, and from a block that is whole and goes on with others.
        s.submit(SequenceId(2), begins(100, 3, 60));
        assert_eq!(step_with_copies(&mut s), (vec![(1, 1), (2, 60)], 1));
        s.submit(SequenceId(3), begins(110, 3, 1));
        assert_eq!(step_with_copies(&mut s), (vec![(1, 1), (2, 1), (3, 11)], 1));
        // From those that have ended, with what they answered.
        (1..=3).for_each(|id| s.finish(SequenceId(id)));
        let answered = [vec![1; 100], vec![2; 5], vec![7; 9]].concat();
        s.submit(SequenceId(4), Arrival { prompt: answered, ..Arrival::default() });
        assert_eq!(step_with_copies(&mut s), (vec![(4, 114 - 107)], 1));
        // Too few to be worth it.
        s.submit(SequenceId(5), begins(64 + COPIED_ROWS_MIN - 1, 9, 20));
        assert_eq!(step_with_copies(&mut s), (vec![(4, 1), (5, 20 + COPIED_ROWS_MIN - 1)], 0));
        let cached = [3, 4, 5].map(|id| s.progress(SequenceId(id)).map(|p| p.cached));
        assert_eq!(cached, [None, Some(107), Some(64)]);
    }

    #[test]
    fn many_rows_that_are_about_to_be_computed_are_waited_for() {
        let mut s = reusing(8, 64, 50);
        s.submit(SequenceId(1), begins(64 + 50, 2, 1));
        s.submit(SequenceId(2), begins(64 + 50, 3, 30));
        assert_eq!(step(&mut s), [(1, 64)]);
        // There is room for some rows of the second one, but it will find them.
        s.submit(SequenceId(3), arrival(1, 0));
        assert_eq!(step(&mut s), [(1, 51), (3, 1)]);
        assert_eq!(step(&mut s), [(1, 1), (3, 1), (2, 30)]);
        // Nobody waits for few.
        let mut s = reusing(8, 64, 50);
        s.submit(SequenceId(1), begins(AWAITED_ROWS_MIN - 1, 2, 30));
        s.submit(SequenceId(2), begins(AWAITED_ROWS_MIN - 1, 3, 3));
        assert_eq!(step(&mut s), [(1, 61), (2, 3)]);
        // Nor for one that stands still.
        let mut s = reusing(8, 10, 50);
        s.submit(SequenceId(1), begins(50, 2, 30));
        assert_eq!(step(&mut s), [(1, 10)]);
        s.submit(SequenceId(2), begins(50, 3, 30));
        s.pause(SequenceId(1), true);
        assert_eq!(step_with_copies(&mut s), (vec![(2, 10)], 1));
        assert_eq!(s.progress(SequenceId(2)).map(|p| p.cached), Some(10));
    }

    #[test]
    fn what_is_there_is_not_waited_for_although_another_has_promised_it() {
        let mut s = reusing(8, 50, 50);
        s.submit(SequenceId(1), arrival(100, 0));
        assert_eq!(step(&mut s), [(1, 50)]);
        s.pause(SequenceId(1), true);
        s.submit(SequenceId(2), arrival(100, 0));
        assert_eq!(step_with_copies(&mut s), (vec![(2, 50)], 1));
        s.pause(SequenceId(1), false);
        s.submit(SequenceId(3), arrival(66, 0));
        assert_eq!(step(&mut s), [(2, 1), (1, 49)]);
        // The first one has given its block up for the second one's.
        assert_eq!(step(&mut s), [(2, 1), (1, 1), (3, 2)]);
        assert_eq!(s.blocks().0, 1 + 3);
    }

    #[test]
    fn a_block_may_be_taken_for_the_one_that_copies_it() {
        let mut s = left_behind(1, begins(20, 2, 10));
        s.submit(SequenceId(2), begins(20, 3, 10));
        // The only block is where the rows are already.
        assert_eq!(step_with_copies(&mut s), (vec![(2, 10)], 0));
        assert_eq!((s.blocks(), s.blocks_kept()), ((1, 1), 0));
    }

    #[test]
    fn copies_of_a_step_that_failed_are_not_found_again() {
        let mut s = left_behind(9, begins(60, 2, 1));
        let kept = s.blocks_kept();
        s.submit(SequenceId(2), begins(50, 3, 10));
        let (mut batch, mut wanted) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut wanted);
        assert_eq!((s.copies().count(), batch.tokens.len()), (1, 10));
        s.step_failed();
        s.finish(SequenceId(2));
        assert_eq!((s.copies().count(), s.blocks_kept()), (0, kept));
    }

    #[test]
    fn what_a_broken_one_was_copied_from_is_not_found_again() {
        let mut s = left_behind(9, begins(60, 2, 1));
        s.submit(SequenceId(2), begins(50, 3, 10));
        assert_eq!(step_with_copies(&mut s), (vec![(2, 10)], 1));
        s.discard(SequenceId(2));
        assert_eq!((s.blocks(), s.blocks_kept()), ((0, 9), 0));
        s.submit(SequenceId(3), begins(50, 3, 10));
        assert_eq!(step_with_copies(&mut s), (vec![(3, 60)], 0));
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
                        for (from, to) in s.copies() {
                            cache[to as usize] = cache[from as usize].clone();
                        }
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
                            for (_, to) in s.copies() {
                                cache[to as usize].fill(None);
                            }
                            s.step_failed();
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

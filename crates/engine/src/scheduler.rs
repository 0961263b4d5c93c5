//! Which sequences advance in a step, and which cache blocks they hold. Pure: no clock, no channel, no IO.
//!
//! Every step first takes one token of each sequence that decodes, then fills what is left of the step's budget with
//! chunks of prompts, oldest first, then admits waiting sequences. A sequence that finds no free block pushes the
//! youngest one back into the queue; that one is computed again later from its tokens, with the same result.

use std::collections::VecDeque;

use oxseek_model::{
    Batch, LogitRows,
    kv::{BLOCK_TOKENS, blocks_for},
};

use crate::BlockPool;

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
    /// Blocks of the cache. The longest sequence must fit alone.
    pub cache_blocks: usize,
}

/// The sequences and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: BlockPool,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    /// Rows per running sequence in the step that was planned.
    planned: Vec<(SequenceId, usize)>,
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
    /// Places kept for sequences that will fork from this one when its prompt is done.
    forks: usize,
    paused: bool,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn decodes(&self) -> bool {
        self.pending() == 1 && self.computed >= self.prompt_tokens
    }
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            pool: BlockPool::new(limits.cache_blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            planned: Vec::new(),
        }
    }

    /// Queues a new sequence, from which `forks` others will fork.
    pub fn submit(&mut self, id: SequenceId, prompt: Vec<u32>, forks: usize) {
        let prompt_tokens = prompt.len();
        let sequence = Sequence {
            id,
            tokens: prompt,
            prompt_tokens,
            computed: 0,
            blocks: Vec::new(),
            forks,
            paused: false,
        };
        self.waiting.push_back(sequence);
    }

    /// Plans a step into `batch`, and the sequences that get a row of logits, in that order, into `sampled`.
    pub fn plan(&mut self, batch: &mut Batch, sampled: &mut Vec<SequenceId>) {
        batch.clear();
        sampled.clear();
        self.planned.clear();
        let mut budget = self.limits.step_tokens_max;
        self.find_blocks_to_decode();
        for at in 0..self.running.len() {
            if self.running[at].decodes() && !self.running[at].paused {
                self.add_rows(at, 1, batch, sampled);
                budget -= 1;
            }
        }
        for at in 0..self.running.len() {
            if !self.running[at].decodes() && !self.running[at].paused {
                budget -= self.add_rows(at, budget, batch, sampled);
            }
        }
        while budget > 0 && self.admit() {
            budget -= self.add_rows(self.running.len() - 1, budget, batch, sampled);
        }
    }

    /// The planned step ran: its rows are in the cache.
    pub fn advance(&mut self) {
        for (id, rows) in std::mem::take(&mut self.planned) {
            if let Some(s) = self.running.iter_mut().find(|s| s.id == id) {
                s.computed += rows;
            }
        }
    }

    /// Sequences of the planned step.
    pub fn planned(&self) -> impl Iterator<Item = SequenceId> {
        self.planned.iter().map(|&(id, _)| id)
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
        let mut fork = Sequence {
            id: child,
            tokens: parent.tokens.clone(),
            prompt_tokens: parent.prompt_tokens,
            computed: parent.computed,
            blocks: Vec::new(),
            forks: 0,
            paused: false,
        };
        let whole = parent.computed / BLOCK_TOKENS;
        let part =
            parent.blocks.get(whole).copied().filter(|_| !parent.computed.is_multiple_of(BLOCK_TOKENS));
        let copy = match (part, part.and_then(|_| self.pool.take())) {
            (Some(_), None) => {
                // No block for the copy: it computes the prompt itself, later.
                fork.computed = 0;
                self.waiting.push_front(fork);
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

    /// Ends a sequence, wherever it is, and frees its blocks.
    pub fn finish(&mut self, id: SequenceId) {
        self.waiting.retain(|s| s.id != id);
        if let Some(at) = self.running.iter().position(|s| s.id == id) {
            self.running.remove(at).blocks.drain(..).for_each(|b| self.pool.release(b));
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

    /// Blocks in use and in all.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.total() - self.pool.free(), self.pool.total())
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

    /// Sends a running sequence back to the head of the queue: a paused one, else the one that came last. The first one
    /// is then never sent back while others run, so that there is always progress.
    fn preempt_one(&mut self) {
        let paused = self.running.iter().rposition(|s| s.paused);
        let Some(at) = paused.or(self.running.len().checked_sub(1)) else { return };
        let mut s = self.running.remove(at);
        s.blocks.drain(..).for_each(|b| self.pool.release(b));
        s.computed = 0;
        self.waiting.push_front(s);
    }

    /// Moves the first waiting sequence that is not paused to the end of the running ones, if there is room for all of
    /// its tokens and forks. Nobody overtakes: a large one would else wait for ever.
    fn admit(&mut self) -> bool {
        let places: usize = self.running.iter().map(|s| 1 + s.forks).sum();
        let Some(at) = self.waiting.iter().position(|s| !s.paused) else { return false };
        let next = &self.waiting[at];
        let blocks = blocks_for(next.tokens.len());
        if places + 1 + next.forks > self.limits.sequences_max || blocks > self.pool.free() {
            return false;
        }
        let Some(mut s) = self.waiting.remove(at) else { return false };
        s.blocks.extend((0..blocks).map_while(|_| self.pool.take()));
        self.running.push(s);
        true
    }

    /// Adds up to `rows_max` rows of a running sequence to the step; answers how many.
    fn add_rows(
        &mut self,
        at: usize,
        rows_max: usize,
        batch: &mut Batch,
        sampled: &mut Vec<SequenceId>,
    ) -> usize {
        let s = &self.running[at];
        let rows = s.pending().min(rows_max);
        if rows == 0 {
            return 0;
        }
        let end = s.computed + rows;
        let logits = if end == s.tokens.len() { LogitRows::Last } else { LogitRows::None };
        batch.push(
            &s.tokens[s.computed..end],
            s.computed,
            s.prompt_tokens,
            &s.blocks[..blocks_for(end)],
            logits,
        );
        if logits == LogitRows::Last {
            sampled.push(s.id);
        }
        self.planned.push((s.id, rows));
        rows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduler(sequences_max: usize, step_tokens_max: usize, cache_blocks: usize) -> Scheduler {
        Scheduler::new(SchedulerLimits { sequences_max, step_tokens_max, cache_blocks })
    }

    /// One step; every sequence that gets logits grows by a token. Answers the rows of each sequence.
    fn step(s: &mut Scheduler) -> Vec<(u64, usize)> {
        let (mut batch, mut sampled) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut sampled);
        let rows = s.planned().map(|id| id.0).zip(batch.sequences.iter().map(|q| q.tokens.len())).collect();
        s.advance();
        sampled.iter().for_each(|&id| s.append(id, 7));
        rows
    }

    #[test]
    fn a_long_prompt_is_cut_and_does_not_stop_the_others() {
        let mut s = scheduler(4, 10, 100);
        s.submit(SequenceId(1), vec![1; 3], 0);
        s.submit(SequenceId(2), vec![1; 25], 0);
        assert_eq!(step(&mut s), [(1, 3), (2, 7)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 9)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 9)]);
        assert_eq!(step(&mut s), [(1, 1), (2, 1)]);
    }

    #[test]
    fn sequences_wait_for_a_place_and_for_the_places_of_forks() {
        let mut s = scheduler(3, 100, 100);
        s.submit(SequenceId(1), vec![1; 2], 1);
        s.submit(SequenceId(2), vec![1; 2], 1);
        assert_eq!(step(&mut s), [(1, 2)]);
        assert_eq!((s.running(), s.waiting()), (1, 1));
        s.finish(SequenceId(1));
        assert_eq!(step(&mut s), [(2, 2)]);
    }

    #[test]
    fn the_last_one_is_sent_back_when_blocks_run_out_and_comes_again() {
        let mut s = scheduler(2, 200, 3);
        s.submit(SequenceId(1), vec![1; 64], 0);
        s.submit(SequenceId(2), vec![1; 64], 0);
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
        s.submit(SequenceId(1), vec![1; 64], 0);
        s.submit(SequenceId(2), vec![1; 64], 0);
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
    fn a_fork_shares_whole_blocks_and_copies_the_last() {
        let mut s = scheduler(3, 200, 10);
        s.submit(SequenceId(1), vec![1; 100], 2);
        let (mut batch, mut sampled) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut sampled);
        s.advance();
        assert!(s.fork(SequenceId(1), SequenceId(2)).is_some());
        assert_eq!(s.blocks().0, 3);
        s.finish(SequenceId(1));
        assert_eq!(s.blocks().0, 2);
        s.finish(SequenceId(2));
        assert_eq!(s.blocks().0, 0);
    }

    #[derive(Debug, Clone)]
    enum Move {
        Submit { tokens: usize, forks: usize },
        Step,
        Finish(usize),
        Pause(usize, bool),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            1 => (1usize..200, 0usize..3).prop_map(|(tokens, forks)| Move::Submit { tokens, forks }),
            8 => Just(Move::Step),
            1 => (0usize..20).prop_map(Move::Finish),
            1 => (0usize..20, any::<bool>()).prop_map(|(i, p)| Move::Pause(i, p)),
        ];
        prop::collection::vec(one, 1..120)
    }

    proptest! {
        #[test]
        fn no_step_breaks_a_bound_and_no_block_is_lost(moves in moves()) {
            let (places, budget, blocks) = (4, 50, 8);
            let mut s = scheduler(places, budget, blocks);
            let mut alive: Vec<(SequenceId, usize)> = Vec::new();
            let mut next = 0;
            for m in moves {
                match m {
                    Move::Submit { tokens, forks } => {
                        next += 1;
                        alive.push((SequenceId(next), forks));
                        s.submit(SequenceId(next), vec![1; tokens], forks);
                    }
                    Move::Finish(i) if !alive.is_empty() => s.finish(alive.remove(i % alive.len()).0),
                    Move::Pause(i, p) if !alive.is_empty() => s.pause(alive[i % alive.len()].0, p),
                    _ => {
                        let (mut batch, mut sampled) = (Batch::default(), Vec::new());
                        s.plan(&mut batch, &mut sampled);
                        prop_assert!(batch.tokens.len() <= budget && s.running() <= places);
                        for q in &batch.sequences {
                            prop_assert_eq!(q.blocks.len(), blocks_for(q.start + q.tokens.len()));
                        }
                        // No block that is written to belongs to two sequences of the step.
                        let mut written: Vec<u32> =
                            batch.sequences.iter().flat_map(|q| {
                                batch.blocks[q.blocks.clone()][q.start / BLOCK_TOKENS..].to_vec()
                            }).collect();
                        written.sort_unstable();
                        let count = written.len();
                        written.dedup();
                        prop_assert_eq!(count, written.len());
                        s.advance();
                        for id in sampled {
                            let at = alive.iter().position(|a| a.0 == id).expect("alive");
                            for _ in 0..std::mem::take(&mut alive[at].1) {
                                next += 1;
                                s.fork(id, SequenceId(next));
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
        }
    }
}

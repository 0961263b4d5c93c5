//! Cache blocks: who holds which, and which hold the beginning of a text that may come again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use oxseek_model::kv::BLOCK_TOKENS;

use crate::scheduler::SequenceId;

/// Most known blocks behind one place that are compared with what goes on there, youngest first.
const FOLLOWERS_SEEN_MAX: usize = 256;

/// The blocks of a paged cache. A block may be shared by sequences that have the same beginning.
///
/// A block may be *known* by what it holds: the block before it, its own tokens, and the form in which its rows are
/// computed. A whole one is shared by those that go on with the same tokens. Of one that is not whole, or goes on with
/// others, the common rows are copied. A known block that nobody holds keeps its rows until the place is needed, least
/// recently used first.
#[derive(Debug, Clone)]
pub struct BlockPool {
    /// Blocks that hold nothing.
    free: Vec<u32>,
    blocks: Vec<Block>,
    /// Known blocks. The key is the whole content, so a hash never decides.
    index: HashMap<Arc<Content>, u32>,
    /// Known blocks by what comes before them, oldest first.
    followers: HashMap<Before, Vec<u32>>,
    /// Known blocks that nobody holds, by the time since when.
    idle: BTreeMap<u64, u32>,
    /// Counts what happens: times of `idle` and names of nodes.
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    holders: u32,
    known: Option<Known>,
    idle_since: u64,
}

#[derive(Debug, Clone)]
struct Known {
    content: Arc<Content>,
    node: Node,
    /// Who is computing it; none when it is done.
    promised_by: Option<SequenceId>,
}

/// Names the content of a block and of all blocks before it. Never used again for another content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Node(u64);

/// What comes before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Before {
    /// Nothing: it is the first one, and only those with the same salt may share it.
    Start(Option<Arc<str>>),
    /// This.
    Block(Node),
}

/// What decides the bits of a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Content {
    before: Before,
    rows: Rows,
}

/// Rows from the beginning of a block on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Rows {
    /// How many of them are computed in the form of prompts; see `LanguageModel::block_form`.
    form: u8,
    tokens: Box<[u32]>,
}

/// A known block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Where it lies.
    pub block: u32,
    /// Its name.
    pub node: Node,
    /// Who is computing it; none when its rows are there.
    pub promised_by: Option<SequenceId>,
}

/// Rows of a block that another one begins with too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where they lie.
    pub block: u32,
    /// How many they are.
    pub rows: usize,
    /// The name of the block; none when it is not known.
    pub node: Option<Node>,
}

impl Content {
    /// The content of a block that holds `tokens` after `before`, computed in the form `form`.
    pub fn new(before: Before, form: u8, tokens: &[u32]) -> Self {
        debug_assert!((1..=BLOCK_TOKENS).contains(&tokens.len()), "a block has rows");
        Self { before, rows: Rows { form, tokens: tokens.into() } }
    }
}

/// How many rows two blocks have in common that come after the same, given the form and the tokens of each.
pub fn common_rows(a: (u8, &[u32]), b: (u8, &[u32])) -> usize {
    let same = a.1.iter().zip(b.1).take_while(|(a, b)| a == b).count();
    // Rows below both forms are computed alike, and so are those that lie above both; what lies between is not.
    if a.0 == b.0 { same } else { same.min(usize::from(a.0.min(b.0))) }
}

impl BlockPool {
    /// `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            // Taken from the end: low ids first, so that a lightly used cache touches few pages.
            free: (0..blocks as u32).rev().collect(),
            blocks: vec![Block::default(); blocks],
            index: HashMap::new(),
            followers: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Takes a free block, or the known one that was not used for the longest time.
    pub fn take(&mut self) -> Option<u32> {
        let block = if let Some(block) = self.free.pop() {
            block
        } else {
            let (_, block) = self.idle.pop_first()?;
            self.forget(block);
            block
        };
        self.blocks[block as usize].holders = 1;
        Some(block)
    }

    /// Adds a holder to a block that is held or known.
    pub fn share(&mut self, block: u32) {
        let b = &mut self.blocks[block as usize];
        if b.holders == 0 {
            debug_assert!(b.known.is_some(), "a free block is not shared");
            self.idle.remove(&b.idle_since);
        }
        b.holders += 1;
    }

    /// Gives a block back. When nobody holds it any more it is free, or idle when it is known and done.
    pub fn release(&mut self, block: u32) {
        let b = &mut self.blocks[block as usize];
        debug_assert!(b.holders > 0, "a block is released once per holder");
        b.holders -= 1;
        if b.holders > 0 {
            return;
        }
        if b.known.as_ref().is_some_and(|k| k.promised_by.is_none()) {
            self.clock += 1;
            b.idle_since = self.clock;
            self.idle.insert(self.clock, block);
        } else {
            self.forget(block);
            self.free.push(block);
        }
    }

    /// The block with this content.
    pub fn find(&self, content: &Content) -> Option<Found> {
        let &block = self.index.get(content)?;
        let known = self.blocks[block as usize].known.as_ref()?;
        Some(Found { block, node: known.node, promised_by: known.promised_by })
    }

    /// The known block behind `before` that has most rows in common with one that holds `tokens` in the form `form`.
    /// Its rows are there.
    pub fn find_part(&self, before: &Before, form: u8, tokens: &[u32]) -> Option<Part> {
        let followers = self.followers.get(before)?;
        let parts = followers.iter().rev().take(FOLLOWERS_SEEN_MAX).filter_map(|&block| {
            let known = self.blocks[block as usize].known.as_ref().filter(|k| k.promised_by.is_none())?;
            let rows = &known.content.rows;
            let rows = common_rows((form, tokens), (rows.form, &rows.tokens));
            Some(Part { block, rows, node: Some(known.node) })
        });
        parts.max_by_key(|p| p.rows).filter(|p| p.rows > 0)
    }

    /// A known block was of use: it is needed longer than others that nobody holds.
    pub fn touch(&mut self, block: u32) {
        if self.is_idle(block) && self.blocks[block as usize].known.is_some() {
            self.share(block);
            self.release(block);
        }
    }

    /// Makes a held block known, unless another one has this content. `promised_by` is computing it; without it the
    /// rows are there. `node` is the name of the content if it has one already.
    pub fn know(
        &mut self,
        block: u32,
        content: Content,
        node: Option<Node>,
        promised_by: Option<SequenceId>,
    ) -> Node {
        if let Some(found) = self.find(&content) {
            return found.node;
        }
        self.forget(block);
        self.clock += 1;
        let node = node.unwrap_or(Node(self.clock));
        let content = Arc::new(content);
        self.index.insert(Arc::clone(&content), block);
        self.followers.entry(content.before.clone()).or_default().push(block);
        self.blocks[block as usize].known = Some(Known { content, node, promised_by });
        node
    }

    /// The rows of a block that was promised are there. False when it was not promised.
    pub fn fulfil(&mut self, block: u32) -> bool {
        let known = self.blocks[block as usize].known.as_mut();
        known.is_some_and(|k| k.promised_by.take().is_some())
    }

    /// Makes a block that is held or taken unknown: nobody finds it any more.
    pub fn forget(&mut self, block: u32) {
        let Some(known) = self.blocks[block as usize].known.take() else { return };
        self.index.remove(&known.content);
        if let Some(followers) = self.followers.get_mut(&known.content.before) {
            followers.retain(|&b| b != block);
            if followers.is_empty() {
                self.followers.remove(&known.content.before);
            }
        }
    }

    /// Makes a block unknown that may be held or idle, unless it is known by another name by now.
    pub fn forget_node(&mut self, block: u32, node: Node) {
        let b = &self.blocks[block as usize];
        if b.known.as_ref().is_none_or(|k| k.node != node) {
            return;
        }
        if b.holders == 0 {
            self.idle.remove(&b.idle_since);
            self.free.push(block);
        }
        self.forget(block);
    }

    /// Blocks that can be taken.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Known blocks that nobody holds.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether nobody holds a block.
    pub fn is_idle(&self, block: u32) -> bool {
        self.blocks[block as usize].holders == 0
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(before: Before, token: u32) -> Content {
        Content::new(before, 0, &[token; BLOCK_TOKENS])
    }

    fn start() -> Before {
        Before::Start(None)
    }

    #[test]
    fn a_known_block_is_found_until_its_place_is_needed() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.take().expect("free"), pool.take().expect("free"));
        let first = pool.know(a, content(start(), 1), None, None);
        let second = pool.know(b, content(Before::Block(first), 1), None, None);
        assert_ne!(first, second);
        [b, a].into_iter().for_each(|block| pool.release(block));
        assert_eq!((pool.free(), pool.idle()), (2, 2));
        // Found, held again, and given back: now it is the younger one.
        assert_eq!(pool.find(&content(start(), 1)).map(|f| f.block), Some(a));
        pool.share(a);
        pool.release(a);
        assert_eq!(pool.take(), Some(b));
        assert_eq!(pool.find(&content(Before::Block(first), 1)), None);
        assert_eq!(pool.take(), Some(a));
        assert_eq!((pool.take(), pool.find(&content(start(), 1))), (None, None));
    }

    #[test]
    fn only_the_same_beginning_form_and_salt_are_the_same() {
        let mut pool = BlockPool::new(4);
        let a = pool.take().expect("free");
        let node = pool.know(a, content(start(), 1), None, None);
        let salted = Before::Start(Some("key".into()));
        let other_form = Content::new(start(), 1, &[1; BLOCK_TOKENS]);
        for other in [content(salted, 1), content(Before::Block(node), 1), content(start(), 2), other_form] {
            assert_eq!(pool.find(&other), None);
        }
        assert_eq!(pool.find(&Content::new(start(), 0, &[1; 63])), None);
    }

    #[test]
    fn rows_that_two_blocks_have_in_common_are_found() {
        let mut pool = BlockPool::new(8);
        let mut know = |before: Before, form, tokens: &[u32], promised_by| {
            let block = pool.take().expect("free");
            let node = pool.know(block, Content::new(before, form, tokens), None, promised_by);
            pool.release(block);
            (block, node)
        };
        let (short, _) = know(start(), 0, &[1, 2, 3], None);
        let (long, node) = know(start(), 0, &[[1, 2].as_slice(), &[4; 62]].concat(), None);
        let (formed, _) = know(start(), 2, &[1, 2, 3, 4, 5], None);
        know(Before::Start(Some("key".into())), 0, &[1, 2, 3, 4], None);
        know(Before::Block(node), 0, &[9; 5], None);
        let find = |pool: &BlockPool, form, tokens: &[u32]| {
            pool.find_part(&start(), form, tokens).map(|p| (p.block, p.rows))
        };
        assert_eq!(find(&pool, 0, &[1, 2, 3, 4, 5]), Some((short, 3)));
        assert_eq!(find(&pool, 0, &[1, 2, 4, 4, 5]), Some((long, 4)));
        assert_eq!(find(&pool, 2, &[1, 2, 3, 4]), Some((formed, 4)));
        // The third row has another form there.
        assert_eq!(find(&pool, 3, &[1, 2, 3, 4]), Some((formed, 2)));
        assert_eq!(find(&pool, 0, &[2]), None);
        assert_eq!(pool.find_part(&Before::Block(node), 0, &[9; 9]).map(|p| p.rows), Some(5));
        // What was of use stays longest.
        pool.touch(short);
        let taken: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((taken.len(), taken.last()), (8, Some(&short)));
        assert_eq!(find(&pool, 0, &[1, 2, 3]), None);
        assert!(pool.followers.is_empty() && pool.index.is_empty());
    }

    #[test]
    fn a_block_is_forgotten_by_its_name_alone() {
        let mut pool = BlockPool::new(1);
        let a = pool.take().expect("free");
        let node = pool.know(a, content(start(), 1), None, None);
        pool.release(a);
        pool.forget_node(a, Node(99));
        assert_eq!((pool.idle(), pool.free()), (1, 1));
        pool.forget_node(a, node);
        assert_eq!((pool.idle(), pool.free(), pool.find(&content(start(), 1))), (0, 1, None));
        // Held by somebody else meanwhile: only its name goes.
        let a = pool.take().expect("free");
        let node = pool.know(a, content(start(), 1), None, None);
        pool.forget_node(a, node);
        assert_eq!((pool.idle(), pool.free(), pool.find(&content(start(), 1))), (0, 0, None));
    }

    #[test]
    fn a_promise_that_is_not_kept_is_forgotten() {
        let mut pool = BlockPool::new(1);
        let a = pool.take().expect("free");
        pool.know(a, content(start(), 1), None, Some(SequenceId(1)));
        assert_eq!(pool.find(&content(start(), 1)).and_then(|f| f.promised_by), Some(SequenceId(1)));
        pool.release(a);
        assert_eq!((pool.find(&content(start(), 1)), pool.free(), pool.idle()), (None, 1, 0));
        let a = pool.take().expect("free");
        pool.know(a, content(start(), 1), None, Some(SequenceId(2)));
        assert!(pool.fulfil(a) && !pool.fulfil(a));
        pool.release(a);
        assert_eq!(pool.idle(), 1);
    }
}

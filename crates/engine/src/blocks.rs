//! Cache blocks: who holds which.

/// The blocks of a paged cache. A block may be shared by sequences that have the same beginning.
#[derive(Debug, Clone)]
pub struct BlockPool {
    free: Vec<u32>,
    holders: Vec<u32>,
}

impl BlockPool {
    /// `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        // Taken from the end: low ids first, so that a lightly used cache touches few pages.
        Self { free: (0..blocks as u32).rev().collect(), holders: vec![0; blocks] }
    }

    /// Takes a free block.
    pub fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// Adds a holder to a block that is held.
    pub fn share(&mut self, block: u32) {
        debug_assert!(self.holders[block as usize] > 0, "a free block is not shared");
        self.holders[block as usize] += 1;
    }

    /// Gives a block back; it is free when nobody holds it any more.
    pub fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        debug_assert!(*holders > 0, "a block is released once per holder");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(block);
        }
    }

    /// Free blocks.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.holders.len()
    }
}

//! The latent cache in memory: rows in their format, paged in blocks, in pages of 2 MiB where the system has them.

use std::{ops::Range, sync::mpsc};

use oxseek_tensor::{
    CacheFormat, Error,
    backend::{BLOCK_TOKENS, CacheShape},
    error::shape_error,
};

use crate::{
    huge::{Arena, HugeBytes},
    numa::Nodes,
    paging::{self, Paging},
};

/// `[layers][blocks][BLOCK_TOKENS]` rows of [`CacheShape::row_bytes`]. What was never written costs no memory.
pub(crate) struct LatentCache {
    pub(crate) shape: CacheShape,
    pub(crate) row_bytes: usize,
    bytes: HugeBytes,
    paging: Paging,
    /// Takes the parts whose pages will be needed.
    ahead: Option<mpsc::Sender<Range<usize>>>,
}

impl LatentCache {
    pub(crate) fn new(shape: CacheShape, nodes: &Nodes) -> Result<Self, Error> {
        let what = "latent cache";
        let (row_bytes, bytes) = (shape.row_bytes()?, shape.bytes()?);
        if bytes == 0 {
            return Err(shape_error("alloc_cache", "elements", 1, 0));
        }
        if bytes > isize::MAX as usize / 2 {
            return Err(Error::Overflow { what });
        }
        let memory = Arena::default().alloc(bytes).map_err(|_| Error::OutOfMemory { what, bytes })?;
        let paging = Paging::new(shape.blocks, BLOCK_TOKENS * row_bytes);
        let ahead = paging::start(memory.pages(), nodes);
        Ok(Self { shape, row_bytes, bytes: memory, paging, ahead })
    }

    fn block_bytes(&self) -> usize {
        BLOCK_TOKENS * self.row_bytes
    }

    fn offset(&self, layer: usize, block: u32) -> usize {
        (layer * self.shape.blocks + block as usize) * self.block_bytes()
    }

    /// The bytes of one row.
    pub(crate) fn row_mut(&mut self, layer: usize, block: u32, slot: usize) -> &mut [u8] {
        self.look_ahead(block);
        let (at, n) = (self.offset(layer, block) + slot * self.row_bytes, self.row_bytes);
        &mut self.bytes.as_mut()[at..at + n]
    }

    /// Has pages made for the blocks that come after `block`.
    fn look_ahead(&mut self, block: u32) {
        let (Some(ahead), Some(due)) = (&self.ahead, self.paging.due(block as usize)) else { return };
        for layer in 0..self.shape.layers {
            let [from, to] = [due.start, due.end].map(|block| self.offset(layer, block as u32));
            // A thread that is gone leaves them to the first write.
            let _ = ahead.send(from..to);
        }
    }

    /// Copies a block in every layer.
    pub(crate) fn copy_block(&mut self, from: u32, to: u32) {
        self.look_ahead(to);
        for layer in 0..self.shape.layers {
            let (from, to) = (self.offset(layer, from), self.offset(layer, to));
            let n = self.block_bytes();
            self.bytes.as_mut().copy_within(from..from + n, to);
        }
    }

    /// All blocks of a layer.
    pub(crate) fn layer(&self, layer: usize) -> LatentRows {
        LatentRows {
            format: self.shape.format,
            latent: self.shape.latent,
            width: self.shape.latent + self.shape.rope,
            row_bytes: self.row_bytes,
            first: self.bytes.as_ptr().wrapping_add(self.offset(layer, 0)),
        }
    }
}

/// One layer of the cache while an op reads it.
#[derive(Clone, Copy)]
pub(crate) struct LatentRows {
    pub(crate) format: CacheFormat,
    pub(crate) latent: usize,
    /// Values of a row.
    pub(crate) width: usize,
    pub(crate) row_bytes: usize,
    first: *const u8,
}

// SAFETY: it only points to the cache, which nobody writes while an op reads it.
#[allow(unsafe_code, reason = "threads read one cache")]
unsafe impl Send for LatentRows {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "threads read one cache")]
unsafe impl Sync for LatentRows {}

impl LatentRows {
    /// The first row of a block; block ids were checked against the cache.
    pub(crate) fn block(&self, id: u32) -> *const u8 {
        self.first.wrapping_add(id as usize * BLOCK_TOKENS * self.row_bytes)
    }

    /// Whether rows are BF16 that the kernels take where they lie: whole pairs, and latent values in whole vectors.
    pub(crate) fn in_place(&self) -> bool {
        self.format == CacheFormat::Bf16 && self.latent.is_multiple_of(32) && self.width.is_multiple_of(2)
    }

    /// Decodes a row into `out`.
    ///
    /// # Safety
    /// `at` is a row of the cache, whose owner is borrowed; `out` has `width` values.
    #[allow(unsafe_code, reason = "a row of the cache as a slice")]
    pub(crate) unsafe fn decode(&self, at: *const u8, out: &mut [f32]) {
        // SAFETY: the caller's promise; a row has `row_bytes`.
        let bytes = unsafe { std::slice::from_raw_parts(at, self.row_bytes) };
        self.format.decode_row(bytes, self.latent, out);
    }

    /// The first `n` rows of a block in F32: where they lie if they are, else in `decoded`.
    ///
    /// # Safety
    /// The block is one of the cache, whose owner is borrowed; `decoded` holds `n` rows of `width` values.
    #[allow(unsafe_code, reason = "rows of the cache as a slice")]
    pub(crate) unsafe fn block_f32(&self, id: u32, n: usize, decoded: &mut [f32]) -> *const f32 {
        if self.format == CacheFormat::F32 {
            // 64 bytes is where the cache begins, and rows are whole F32.
            return self.block(id).cast();
        }
        for (slot, out) in decoded.chunks_exact_mut(self.width).take(n).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.decode(self.block(id).wrapping_add(slot * self.row_bytes), out) };
        }
        decoded.as_ptr()
    }
}

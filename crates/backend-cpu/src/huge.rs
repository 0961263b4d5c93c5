//! Memory for packed weights in pages of 2 MiB: reading 4 KiB pages costs a third of the bandwidth in page walks.
#![allow(unsafe_code, reason = "parts of one mapping are handed out as slices")]

use std::{ops::Range, sync::Arc};

use memmap2::MmapMut;
use oxseek_tensor::Error;

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// Bytes mapped at a time. Pages that are never written cost nothing.
const CHUNK: usize = 256 << 20;
/// Where each allocation begins: a cache line.
const ALIGN: usize = 64;

/// A mapping whose parts belong to different [`HugeBytes`].
struct Chunk {
    base: *mut u8,
    map: MmapMut,
}

// SAFETY: the mapping belongs to the chunk, and its parts are disjoint.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// Bytes of an [`Arena`], zeroed at first.
pub(crate) struct HugeBytes {
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

impl HugeBytes {
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.chunk.base.wrapping_add(self.offset)
    }

    pub(crate) fn as_ref(&self) -> &[u8] {
        // SAFETY: as in `as_mut`, and nobody writes while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(crate) fn pages(&self) -> Pages {
        Pages { chunk: Arc::clone(&self.chunk), offset: self.offset }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: the arena gave these bytes to this value alone, inside of the chunk, which it keeps alive.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.base.add(self.offset), self.len) }
    }
}

/// The pages of a [`HugeBytes`], for a thread that neither reads nor writes them.
pub(crate) struct Pages {
    chunk: Arc<Chunk>,
    offset: usize,
}

impl Pages {
    /// Has the system make the pages of these bytes; they keep what they hold. Linux before 5.14 and other systems make
    /// them when they are written.
    pub(crate) fn make(&self, bytes: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            let start = self.chunk.base.addr() - self.chunk.map.as_ptr().addr() + self.offset + bytes.start;
            let _ = self.chunk.map.advise_range(memmap2::Advice::PopulateWrite, start, bytes.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (self.offset, bytes);
    }
}

/// Hands out memory that lives as long as what was handed out.
#[derive(Default)]
pub(crate) struct Arena {
    open: Option<Arc<Chunk>>,
    used: usize,
    size: usize,
}

impl Arena {
    /// `len` zeroed bytes at a cache line.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn alloc(&mut self, len: usize) -> Result<HugeBytes, Error> {
        let start = self.used.next_multiple_of(ALIGN);
        if let Some(chunk) = self.open.as_ref().filter(|_| start + len <= self.size) {
            self.used = start + len;
            return Ok(HugeBytes { chunk: Arc::clone(chunk), offset: start, len });
        }
        let size = CHUNK.max(len.next_multiple_of(HUGE_PAGE));
        let full = || Error::OutOfMemory { what: "packed weights", bytes: size };
        let mut map = MmapMut::map_anon(size + HUGE_PAGE).map_err(|_| full())?;
        // A kernel without transparent huge pages refuses; then 4 KiB pages do the work.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let base = map.as_mut_ptr();
        let base = base.wrapping_add(base.align_offset(HUGE_PAGE));
        let chunk = Arc::new(Chunk { base, map });
        self.open = Some(Arc::clone(&chunk));
        (self.used, self.size) = (len, size);
        Ok(HugeBytes { chunk, offset: 0, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_made_keep_their_bytes() {
        let mut bytes = Arena::default().alloc(9 << 20).unwrap();
        bytes.as_mut().fill(7);
        let pages = bytes.pages();
        std::thread::scope(|s| {
            s.spawn(|| [0..1, 4095..4097, 1 << 20..9 << 20].map(|part| pages.make(part)));
            bytes.as_mut()[3 << 20..].fill(8);
        });
        assert!(bytes.as_ref().iter().enumerate().all(|(i, b)| *b == 7 + u8::from(i >= 3 << 20)));
    }

    #[test]
    fn parts_do_not_meet() {
        let mut arena = Arena::default();
        let mut parts: Vec<HugeBytes> = [1, 100, 3 << 20, 64].map(|n| arena.alloc(n).unwrap()).into();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.as_mut().iter().all(|b| *b == 0));
            part.as_mut().fill(i as u8 + 1);
            assert_eq!(part.as_ptr().align_offset(ALIGN), 0);
        }
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.as_mut().iter().all(|b| *b == i as u8 + 1));
        }
        let large = arena.alloc(CHUNK + 1).unwrap();
        assert_eq!(large.as_ptr().align_offset(HUGE_PAGE), 0);
    }
}

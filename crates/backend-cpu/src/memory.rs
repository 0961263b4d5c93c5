//! Memory that threads share for the time of one fork.
#![allow(unsafe_code, reason = "threads write disjoint parts of one buffer")]

use std::cell::UnsafeCell;

/// A pointer into a buffer whose parts are written by different threads. What it points to is alive for the fork, and
/// each op says why no two tasks touch the same part.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: it is only a place; whoever reads or writes through it says why that is sound.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The place `offset` values further. Following it is what needs a reason, not making it.
    pub(crate) fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// The same for bytes.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(*mut u8);

// SAFETY: it is only a place; whoever reads or writes through it says why that is sound.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    pub(crate) fn new(bytes: &mut [u8]) -> Self {
        Self(bytes.as_mut_ptr())
    }

    /// The place `offset` bytes further.
    pub(crate) fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

/// Scratch of one thread, grown to what the largest op needed and kept.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Decoded weight rows.
    pub(crate) panel: Vec<f32>,
    parts: [Vec<f32>; 6],
}

impl Scratch {
    /// Six zero-or-stale arrays of at least the asked lengths.
    pub(crate) fn split(&mut self, lengths: [usize; 6]) -> (&mut Vec<f32>, [&mut [f32]; 6]) {
        for (part, n) in self.parts.iter_mut().zip(lengths) {
            if part.len() < n {
                part.resize(n, 0.0);
            }
        }
        let mut lengths = lengths.into_iter();
        let parts = self.parts.each_mut().map(|p| &mut p[..lengths.next().unwrap_or(0)]);
        (&mut self.panel, parts)
    }
}

/// One [`Scratch`] per thread of the pool.
pub(crate) struct PerThread(Vec<UnsafeCell<Scratch>>);

// SAFETY: each thread only takes its own entry, see `of`.
unsafe impl Sync for PerThread {}

impl PerThread {
    pub(crate) fn new(threads: usize) -> Self {
        Self((0..threads).map(|_| UnsafeCell::default()).collect())
    }

    /// Makes room for decoded rows in every thread's scratch.
    pub(crate) fn grow_panels(&mut self, len: usize) {
        for s in &mut self.0 {
            let panel = &mut s.get_mut().panel;
            if panel.len() < len {
                panel.resize(len, 0.0);
            }
        }
    }

    /// The scratch of `thread`.
    ///
    /// # Safety
    /// `thread` is the number that the pool gave to the running task, and the last reference is gone: the pool never
    /// runs two tasks of the same number at once.
    #[allow(clippy::mut_from_ref, reason = "each thread has its own entry")]
    pub(crate) unsafe fn of(&self, thread: usize) -> &mut Scratch {
        // SAFETY: the caller's promise makes this the only reference.
        unsafe { &mut *self.0[thread].get() }
    }
}

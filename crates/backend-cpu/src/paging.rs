//! Pages of the latent cache are made before rows come to them. A first write to a page of 2 MiB waits until the system
//! has found and cleared it, for milliseconds in a virtual machine, and in one step rows come to one in every layer.

use std::{ops::Range, sync::mpsc, thread};

use crate::{
    huge::{HUGE_PAGE, Pages},
    numa::Nodes,
};

/// How much nicer than others the thread is that has pages made: Linux gives it a tenth of a core that is wanted.
#[cfg(target_os = "linux")]
const NICER: i32 = 10;

/// What of a cache's layers was asked for.
pub(crate) struct Paging {
    /// Blocks of each layer.
    blocks: usize,
    /// Those of them that a page holds.
    step: usize,
    /// Those whose pages were asked for: the first ones, as the engine takes low ids first.
    asked: usize,
}

impl Paging {
    pub(crate) fn new(blocks: usize, block_bytes: usize) -> Self {
        Self { blocks, step: HUGE_PAGE.div_ceil(block_bytes), asked: 0 }
    }

    /// The blocks to ask for when `block` is written: a page more once half of the last one is used.
    pub(crate) fn due(&mut self, block: usize) -> Option<Range<usize>> {
        let wanted = (block + 1 + self.step / 2).min(self.blocks);
        if wanted <= self.asked {
            return None;
        }
        let from = self.asked;
        self.asked = wanted.max(from + self.step).min(self.blocks);
        Some(from..self.asked)
    }
}

/// Starts a thread that has the parts of `pages` made that it is sent. It ends with the sender. They are
/// made on the first node, whose thread writes rows. None: pages are made when they are written.
pub(crate) fn start(pages: Pages, nodes: &Nodes) -> Option<mpsc::Sender<Range<usize>>> {
    let (parts, inbox) = mpsc::channel::<Range<usize>>();
    let first = nodes.clone();
    let work = move || {
        first.enter(0);
        leave_the_cores();
        for part in inbox {
            // Page by page: the system holds a lock while it makes one.
            for start in part.clone().step_by(HUGE_PAGE) {
                pages.make(start..part.end.min(start + HUGE_PAGE));
            }
        }
    };
    thread::Builder::new().name("oxseek-cache".into()).spawn(work).ok().map(|_| parts)
}

/// Other threads come before this one from now on.
fn leave_the_cores() {
    #[cfg(target_os = "linux")]
    {
        let thread = Some(rustix::thread::gettid());
        if let Ok(nice) = rustix::process::getpriority_process(thread) {
            let _ = rustix::process::setpriority_process(thread, nice + NICER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_asked_for_when_half_of_the_last_is_used() {
        let mut paging = Paging::new(25, HUGE_PAGE / 10);
        assert_eq!(paging.step, 11);
        let due: Vec<_> = (0..25).filter_map(|block| Some((block, paging.due(block)?))).collect();
        assert_eq!(due, [(0, 0..11), (6, 11..22), (17, 22..25)]);
        assert_eq!(paging.due(3), None);
    }

    #[test]
    fn blocks_may_be_larger_than_pages_and_come_in_any_order() {
        let mut paging = Paging::new(9, 3 * HUGE_PAGE);
        assert_eq!([4, 2, 5, 8].map(|block| paging.due(block)), [Some(0..5), None, Some(5..6), Some(6..9)]);
    }
}

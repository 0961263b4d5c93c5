//! What each op forks, and how rows become tasks.
#![allow(
    unsafe_code,
    reason = "ops hand buffers to kernels as pointers; each block says why no two tasks meet"
)]

pub(crate) mod matmul;
pub(crate) mod mla;
pub(crate) mod moe;
pub(crate) mod norm;
pub(crate) mod rope;

/// Rows that a task takes whole: two groups of packed rows.
const ROWS_TOGETHER: usize = 32;

/// Multiply-adds that take about as long as a fork.
const WORK_WORTH_A_FORK: usize = 32 << 10;

/// How the rows of a fork are shared out: about four tasks a thread, so that a thread that was held up leaves work for
/// the others, and all as long as whole tiles allow, so that threads with as many tasks end together.
#[derive(Clone, Copy)]
pub(crate) struct RowShares {
    rows: usize,
    tasks: usize,
}

impl RowShares {
    /// One task where there is too little to share; `work` in multiply-adds.
    pub(crate) fn new(rows: usize, work: usize, threads: usize) -> Self {
        Self::of_tasks(rows, work, threads, 4)
    }

    /// The same with `each` tasks for each thread.
    pub(crate) fn of_tasks(rows: usize, work: usize, threads: usize, each: usize) -> Self {
        let alone = threads == 1 || work < WORK_WORTH_A_FORK;
        let most = if alone { 1 } else { rows.div_ceil(ROWS_TOGETHER).max(1) };
        Self { rows, tasks: most.min(threads * each) }
    }

    pub(crate) fn tasks(self) -> usize {
        self.tasks
    }

    pub(crate) fn of(self, task: usize) -> std::ops::Range<usize> {
        let tiles = self.rows.div_ceil(ROWS_TOGETHER);
        let from = |task: usize| self.rows.min(tiles * task / self.tasks * ROWS_TOGETHER);
        from(task)..from(task + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_each_other_and_differ_by_a_tile_at_most() {
        for rows in [0, 1, 31, 32, 33, 576, 1408, 11_264, 129_280] {
            for threads in [1, 2, 3, 16] {
                let shares = RowShares::new(rows, usize::MAX, threads);
                let lengths: Vec<usize> = (0..shares.tasks()).map(|t| shares.of(t).len()).collect();
                assert_eq!(lengths.iter().sum::<usize>(), rows);
                let whole = &lengths[..lengths.len() - 1];
                let (least, most) = (whole.iter().min(), whole.iter().max());
                assert!(most.zip(least).is_none_or(|(m, l)| m - l <= ROWS_TOGETHER), "{lengths:?}");
                assert!((1..shares.tasks()).all(|t| shares.of(t - 1).end == shares.of(t).start));
            }
        }
    }
}

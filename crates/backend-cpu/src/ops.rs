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

/// Rows per task: about four tasks a thread, so that a thread that was held up leaves work for the others; whole
/// tiles; and everything in one task when there is too little to share (`work` in multiply-adds).
pub(crate) fn rows_per_task(rows: usize, work: usize, threads: usize) -> usize {
    if threads == 1 || work < WORK_WORTH_A_FORK {
        return rows.max(1);
    }
    rows.div_ceil(threads * 4).next_multiple_of(ROWS_TOGETHER)
}

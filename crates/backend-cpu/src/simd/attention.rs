//! Attention in BF16: queries side by side in the lanes, cached rows broadcast.
//!
//! Sixteen queries that see the same rows form a group: the heads of one token over its latent rows, or sixteen tokens
//! of a prompt over the keys of one head. They are laid out like packed weights (`packed.rs`), so that a score never
//! crosses lanes, the softmax runs lane by lane, and its weights come out where the sums over values want them. A row
//! of the cache is read once for all queries.

#![allow(
    clippy::needless_range_loop,
    clippy::manual_memcpy,
    reason = "a tile's indices name rows and lanes, and closures lose the CPU features"
)]

use super::{
    Simd,
    elementwise::exp2,
    panel::{Panel, STREAM_AHEAD},
};
use crate::packed::GROUP_ROWS;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
mod cached;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub(crate) use cached::CachedRows;
pub(super) use cached::decode_rows;

/// Positions whose scores are made, weighed and summed together: their rows fit an L2 cache beside the rest.
pub(crate) const CHUNK: usize = 128;

/// What the kernels below need beyond products of pairs.
///
/// # Safety
/// As [`Panel`].
pub(crate) trait Lanes: Panel {
    /// Whether there are 32 vectors of sixteen F32: tiles are larger then.
    const WIDE: bool;
    /// Sixteen BF16 at `a` and at `b` as pairs.
    unsafe fn interleave(a: *const u8, b: *const u8) -> Self::W;
    /// Thirty-two.
    #[inline(always)]
    unsafe fn interleave_more(a: *const u8, b: *const u8) -> [Self::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { [Self::interleave(a, b), Self::interleave(a.add(32), b.add(32))] }
    }
    /// Sixteen signed bytes at `p`.
    unsafe fn load_i8(p: *const u8) -> Self::F;
    /// Sixteen E4M3 codes at `p`, times 2^-120: sign, exponent and mantissa moved into place.
    unsafe fn load_e4m3_small(p: *const u8) -> Self::F;
    /// Sixteen values as BF16, rounded to nearest even; a NaN stays one.
    unsafe fn store_bf16(v: Self::F, p: *mut u8);
    /// Sixteen pairs of values at `even` and `odd`, neither negative nor NaN, as BF16.
    #[inline(always)]
    unsafe fn store_pairs(even: *const f32, odd: *const f32, p: *mut u8) {
        // SAFETY: the caller's promise: sixteen values and room for as many pairs.
        unsafe {
            let (even, odd) = (even.cast::<[f32; 16]>().read(), odd.cast::<[f32; 16]>().read());
            for i in 0..16 {
                let pair = nearest(even[i]) >> 16 | nearest(odd[i]) & 0xffff_0000;
                p.add(i * 4).cast::<u32>().write_unaligned(pair);
            }
        }
    }
}

/// Rows in memory: runs of `run` rows, `stride` bytes apart, each run somewhere.
#[derive(Clone, Copy)]
pub(crate) struct RowRuns<'a> {
    pub(crate) runs: &'a [*const u8],
    /// Rows of each run but the last, which may be cut short; even.
    pub(crate) run: usize,
    pub(crate) stride: usize,
    /// Rows in all.
    pub(crate) n: usize,
    /// What will be read next: a hint.
    pub(crate) next: *const u8,
}

impl<'a> RowRuns<'a> {
    /// `n` rows after which nothing is known to come.
    pub(crate) fn new(runs: &'a [*const u8], run: usize, stride: usize, n: usize) -> Self {
        Self { runs, run, stride, n, next: std::ptr::null() }
    }
}

/// `out[j][r] = panel row r . row j` for all rows, and panel rows `0..cols`.
///
/// # Safety (of the kernel)
/// `panel` holds `ceil(cols / 16)` groups of `units` times 64 bytes; a row holds `units` pairs; `out` has `n` rows of
/// `cols` values, `out_stride` apart.
pub(crate) struct DotRows<'a> {
    pub(crate) panel: *const u8,
    pub(crate) units: usize,
    pub(crate) cols: usize,
    pub(crate) rows: RowRuns<'a>,
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// Adds a chunk of at most [`CHUNK`] positions to the running softmax of `lanes` queries.
///
/// Scores are powers of two: the queries were scaled by `softmax_scale * log2(e)`.
///
/// # Safety (of the kernel)
/// `queries` is a panel of whole groups for `lanes` queries of `units` pairs; a row of `keys` has `units` pairs, one of
/// `values` `width` BF16, a multiple of 32; there are as many keys as values, at least one; `maxima` and `sums` hold a
/// value per lane of whole groups, `o` as many rows of `width` values; `scratch` is of [`scratch_len`].
pub(crate) struct AttendChunk<'a> {
    pub(crate) queries: *const u8,
    pub(crate) units: usize,
    pub(crate) lanes: usize,
    pub(crate) keys: RowRuns<'a>,
    pub(crate) values: RowRuns<'a>,
    pub(crate) width: usize,
    /// The first query sees this many rows of the chunk, each one after it one more; `None`: all see all.
    pub(crate) seen: Option<isize>,
    pub(crate) maxima: *mut f32,
    pub(crate) sums: *mut f32,
    pub(crate) o: *mut f32,
    pub(crate) scratch: *mut f32,
}

/// F32 that [`AttendChunk`] needs as scratch: scores, pairs of weights, what becomes of the sums so far.
pub(crate) fn scratch_len(lanes: usize) -> usize {
    lanes.next_multiple_of(GROUP_ROWS) * (CHUNK + CHUNK / 2 + 1)
}

/// Weights that so few rows use come from memory, and are asked for ahead.
const STREAM_ROWS_MAX: usize = 4;

/// # Safety
/// As [`DotRows`] says, and the CPU features of `P`.
#[inline(always)]
pub(super) unsafe fn dot_rows<P: Lanes>(d: &DotRows<'_>) {
    let groups = d.cols.div_ceil(GROUP_ROWS);
    let mut group = 0;
    while group < groups {
        let pair = P::WIDE && group + 1 < groups;
        let mut done = 0;
        for (i, &at) in d.rows.runs.iter().enumerate() {
            let n = d.rows.run.min(d.rows.n - done);
            let next = d.rows.runs.get(i + 1).copied().unwrap_or(d.rows.next);
            let run = Run { at, next, row: done, n };
            // SAFETY: groups and rows lie inside of the caller's.
            unsafe {
                if pair {
                    dot_run::<P, 2>(d, group, &run);
                } else {
                    dot_run::<P, 1>(d, group, &run);
                }
            }
            done += n;
        }
        group += if pair { 2 } else { 1 };
    }
}

/// `n` rows from `row` on, which begin at `at`; those at `next` follow.
struct Run {
    at: *const u8,
    next: *const u8,
    row: usize,
    n: usize,
}

/// One run with `G` groups.
#[inline(always)]
unsafe fn dot_run<P: Lanes, const G: usize>(d: &DotRows<'_>, group: usize, run: &Run) {
    let mut j = 0;
    // SAFETY: rows below `n`.
    unsafe {
        while P::WIDE && G == 1 && run.n - j >= 16 {
            dot_tile::<P, G, 16>(d, group, run, j);
            j += 16;
        }
        while P::WIDE && run.n - j >= 8 {
            dot_tile::<P, G, 8>(d, group, run, j);
            j += 8;
        }
        while run.n - j >= 4 {
            dot_tile::<P, G, 4>(d, group, run, j);
            j += 4;
        }
        while run.n > j {
            dot_tile::<P, G, 1>(d, group, run, j);
            j += 1;
        }
    }
}

/// Rows `j..j + T` of a run.
#[inline(always)]
unsafe fn dot_tile<P: Lanes, const G: usize, const T: usize>(
    d: &DotRows<'_>,
    group: usize,
    run: &Run,
    j: usize,
) {
    // SAFETY: the groups and `T` rows lie inside of the caller's; what lies past `cols` is not written.
    unsafe {
        let mut acc = [[P::splat(0.0); T]; G];
        let tile = Tile {
            panel: d.panel.add(group * d.units * 64),
            group_bytes: d.units * 64,
            x: run.at.add(j * d.rows.stride),
            stride: d.rows.stride,
            // The first groups bring rows into the cache for the others.
            ahead: match (group, j + T < run.n) {
                (0, true) => run.at.wrapping_add((j + T) * d.rows.stride),
                (0, false) => run.next,
                _ => std::ptr::null(),
            },
        };
        let mut u = 0;
        while P::WIDE && u + 4 <= d.units {
            add_units::<P, G, T, 4>(&tile, u, &mut acc);
            u += 4;
        }
        while u < d.units {
            add_units::<P, G, T, 1>(&tile, u, &mut acc);
            u += 1;
        }
        for i in 0..G {
            let first = (group + i) * GROUP_ROWS;
            for t in 0..T {
                let out = d.out.add((run.row + j + t) * d.out_stride + first);
                if d.cols - first >= GROUP_ROWS {
                    P::store(acc[i][t], out);
                } else {
                    let mut lanes = [0.0f32; GROUP_ROWS];
                    P::store(acc[i][t], lanes.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), out, d.cols - first);
                }
            }
        }
    }
}

/// Some groups of a panel and some rows.
struct Tile {
    panel: *const u8,
    group_bytes: usize,
    x: *const u8,
    stride: usize,
    /// The rows to come, as many; null where they are in the cache.
    ahead: *const u8,
}

/// `U` units stay in registers while the rows pass by.
#[inline(always)]
unsafe fn add_units<P: Lanes, const G: usize, const T: usize, const U: usize>(
    tile: &Tile,
    u: usize,
    acc: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the units inside of the panel and the rows. Loops, not closures: a closure that is not
    // inlined is compiled without the level's features.
    unsafe {
        let w = tile.panel.add(u * 64);
        let mut units = [[P::load_bf16(w); U]; G];
        for i in 0..G {
            for k in 0..U {
                let unit = w.add(i * tile.group_bytes + k * 64);
                if T <= STREAM_ROWS_MAX {
                    P::prefetch(unit.wrapping_add(STREAM_AHEAD));
                }
                units[i][k] = P::load_bf16(unit);
            }
        }
        if U == 4 && T >= 8 && !tile.ahead.is_null() {
            // Sixteen rows are as many cache lines as they have units: each unit asks for one of the rows to come,
            // which sixteen streams side by side would wait for.
            for k in 0..U * T / 16 {
                P::prefetch(tile.ahead.wrapping_add((u * T / 16 + k) * 64));
            }
        }
        for t in 0..T {
            let x = tile.x.add(t * tile.stride + u * 4);
            for k in 0..U {
                let pair = P::pair(x.add(k * 4));
                for i in 0..G {
                    acc[i][t] = P::dot_bf16(acc[i][t], units[i][k], pair);
                }
            }
        }
    }
}

/// # Safety
/// As [`AttendChunk`] says, and the CPU features of `S` and `P`.
#[inline(always)]
pub(super) unsafe fn attend_chunk<S: Simd, P: Lanes>(c: &AttendChunk<'_>) {
    let width = c.lanes.next_multiple_of(GROUP_ROWS);
    let scores = c.scratch;
    let words = scores.wrapping_add(width * CHUNK);
    let keep = words.wrapping_add(width * CHUNK / 2);
    // SAFETY: the caller's promise; the three parts make up the scratch.
    unsafe {
        dot_rows::<P>(&DotRows {
            panel: c.queries,
            units: c.units,
            cols: width,
            rows: c.keys,
            out: scores,
            out_stride: width,
        });
        if let Some(seen) = c.seen {
            hide(scores, c.keys.n, width, seen);
        }
        let mut lane = 0;
        while lane < width {
            softmax::<S, P>(c, scores.add(lane), words.add(lane), keep.add(lane), width, lane);
            lane += GROUP_ROWS;
        }
        let mut column = 0;
        while column < c.width {
            for lane in (0..c.lanes).step_by(if P::WIDE { 8 } else { 4 }) {
                if P::WIDE {
                    sum_values::<P, 8, 2>(c, words, keep, width, lane, column);
                } else {
                    sum_values::<P, 4, 1>(c, words, keep, width, lane, column);
                }
            }
            column += if P::WIDE { 32 } else { 16 };
        }
    }
}

/// Scores of rows that a query does not see become minus infinity.
#[inline(always)]
unsafe fn hide(scores: *mut f32, n: usize, width: usize, seen: isize) {
    for j in 0..n {
        // Queries from this lane on see row `j`.
        let first = (j as isize + 1 - seen).clamp(0, width as isize) as usize;
        // SAFETY: `n` rows of `width` scores.
        unsafe { std::slice::from_raw_parts_mut(scores.add(j * width), first).fill(f32::NEG_INFINITY) };
    }
}

/// The weights of one group of lanes as pairs of positions, and the running maxima and sums.
#[inline(always)]
unsafe fn softmax<S: Simd, P: Lanes>(
    c: &AttendChunk<'_>,
    scores: *const f32,
    words: *mut f32,
    keep: *mut f32,
    width: usize,
    group: usize,
) {
    let n = c.keys.n;
    let mut sums = [0.0f32; GROUP_ROWS];
    let mut minus = [0.0f32; GROUP_ROWS];
    // SAFETY: `n` rows of scores; pairs of rows in `words`; whole groups, which are whole vectors.
    unsafe {
        for lane in (0..GROUP_ROWS).step_by(S::LANES) {
            let maxima = c.maxima.add(group + lane);
            let before = S::load(maxima);
            let max = most::<S>(before, scores.add(lane), n, width);
            max.store(maxima);
            // A query that has seen nothing yet has no maximum: it must not become NaN.
            let less = max.max(S::splat(f32::MIN)).mul(S::splat(-1.0));
            let factor = exp2::<S>(before.max(S::splat(f32::MIN)).add(less));
            less.store(minus.as_mut_ptr().add(lane));
            factor.store(keep.add(lane));
            S::load(c.sums.add(group + lane)).mul(factor).store(sums.as_mut_ptr().add(lane));
        }
        let mut pair = [0.0f32; 2 * GROUP_ROWS];
        for j in (0..n).step_by(2) {
            let row = scores.add(j * width);
            // A last row without a partner pairs with nothing.
            let other = if j + 1 < n { row.add(width) } else { NOTHING.as_ptr() };
            for lane in (0..GROUP_ROWS).step_by(S::LANES) {
                let (less, sum) = (S::load(minus.as_ptr().add(lane)), sums.as_mut_ptr().add(lane));
                let even = exp2::<S>(S::load(row.add(lane)).add(less));
                let odd = exp2::<S>(S::load(other.add(lane)).add(less));
                even.store(pair.as_mut_ptr().add(lane));
                odd.store(pair.as_mut_ptr().add(GROUP_ROWS + lane));
                S::load(sum).add(even.add(odd)).store(sum);
            }
            P::store_pairs(pair.as_ptr(), pair.as_ptr().add(GROUP_ROWS), words.add(j / 2 * width).cast());
        }
        std::ptr::copy_nonoverlapping(sums.as_ptr(), c.sums.add(group), GROUP_ROWS);
    }
}

/// Scores of a position that is not there.
static NOTHING: [f32; GROUP_ROWS] = [f32::NEG_INFINITY; GROUP_ROWS];

/// The largest of `n` rows of scores and of `before`, lane by lane.
#[inline(always)]
unsafe fn most<S: Simd>(before: S, scores: *const f32, n: usize, width: usize) -> S {
    // Several chains hide the latency.
    let mut most = [before; 4];
    // SAFETY: the caller has `n` rows.
    unsafe {
        for j in (0..n - n % 4).step_by(4) {
            for i in 0..4 {
                most[i] = most[i].max(S::load(scores.add((j + i) * width)));
            }
        }
        for j in n - n % 4..n {
            most[0] = most[0].max(S::load(scores.add(j * width)));
        }
        most[0].max(most[1]).max(most[2].max(most[3]))
    }
}

/// The bits of a weight, neither negative nor NaN, rounded to BF16 in their upper half; a NaN stays one.
#[inline(always)]
fn nearest(v: f32) -> u32 {
    let u = v.to_bits();
    u + 0x7fff + ((u >> 16) & 1)
}

/// `o = o * keep + sum of weights times values` for `H` queries and `V` vectors of columns.
#[inline(always)]
unsafe fn sum_values<P: Lanes, const H: usize, const V: usize>(
    c: &AttendChunk<'_>,
    words: *const f32,
    keep: *const f32,
    width: usize,
    lane: usize,
    column: usize,
) {
    // SAFETY: whole groups of queries have their place in `o` and `words`; the columns lie inside of the values.
    unsafe {
        let o = c.o.add(lane * c.width + column);
        let mut acc = [[P::splat(0.0); V]; H];
        for h in 0..H {
            let keep = P::splat(*keep.add(lane + h));
            for v in 0..V {
                acc[h][v] = P::mul(P::load(o.add(h * c.width + v * 16)), keep);
            }
        }
        let mut done = 0;
        for &run in c.values.runs {
            let n = c.values.run.min(c.values.n - done);
            let words = words.add(done / 2 * width + lane);
            for p in 0..n.div_ceil(2) {
                let even = run.add(p * 2 * c.values.stride + column * 2);
                // A last row without a partner is its own: its weight there is zero.
                let odd = if p * 2 + 1 < n { even.add(c.values.stride) } else { even };
                let mut pairs = [P::interleave(even, odd); V];
                if V == 2 {
                    let both = P::interleave_more(even, odd);
                    for v in 0..V {
                        pairs[v] = both[v];
                    }
                }
                for h in 0..H {
                    let weight = P::pair(words.add(p * width + h).cast());
                    for v in 0..V {
                        acc[h][v] = P::dot_bf16(acc[h][v], pairs[v], weight);
                    }
                }
            }
            done += n;
        }
        for h in 0..H {
            for v in 0..V {
                P::store(acc[h][v], o.add(h * c.width + v * 16));
            }
        }
    }
}

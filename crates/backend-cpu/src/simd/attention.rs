//! Attention in BF16: queries side by side in the lanes, cached rows broadcast.
//!
//! Sixteen queries that see the same rows form a group: the heads of one token over its latent rows, or sixteen tokens
//! of a prompt over the keys of one head. They are laid out like packed weights (`packed.rs`), so that a score never
//! crosses lanes, the softmax runs lane by lane, and its weights come out where the sums over values want them. A row
//! of the cache is read once for all queries.

#![allow(
    clippy::needless_range_loop,
    reason = "a tile's indices name rows and lanes, and closures lose the CPU features"
)]

use super::{Simd, elementwise::exp2, panel::Panel};
use crate::packed::GROUP_ROWS;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

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
}

/// Rows of BF16 in memory: runs of `run` rows, `stride` bytes apart, each run somewhere.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    pub(crate) runs: &'a [*const u8],
    /// Rows of each run but the last, which may be cut short; even.
    pub(crate) run: usize,
    pub(crate) stride: usize,
    /// Rows in all.
    pub(crate) n: usize,
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
    pub(crate) rows: Bf16Rows<'a>,
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
    pub(crate) keys: Bf16Rows<'a>,
    pub(crate) values: Bf16Rows<'a>,
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

/// # Safety
/// As [`DotRows`] says, and the CPU features of `P`.
#[inline(always)]
pub(super) unsafe fn dot_rows<P: Lanes>(d: &DotRows<'_>) {
    let groups = d.cols.div_ceil(GROUP_ROWS);
    let mut group = 0;
    while group < groups {
        let pair = P::WIDE && group + 1 < groups;
        let mut done = 0;
        for &run in d.rows.runs {
            let n = d.rows.run.min(d.rows.n - done);
            // SAFETY: groups and rows lie inside of the caller's.
            unsafe {
                if pair {
                    run_of::<P, 2>(d, group, run, done, n);
                } else {
                    run_of::<P, 1>(d, group, run, done, n);
                }
            }
            done += n;
        }
        group += if pair { 2 } else { 1 };
    }
}

/// `n` rows from `row` on, which begin at `at`, with `G` groups.
#[inline(always)]
unsafe fn run_of<P: Lanes, const G: usize>(
    d: &DotRows<'_>,
    group: usize,
    at: *const u8,
    row: usize,
    n: usize,
) {
    let mut j = 0;
    // SAFETY: rows below `n`.
    unsafe {
        while P::WIDE && G == 1 && n - j >= 16 {
            dot_tile::<P, G, 16>(d, group, at.add(j * d.rows.stride), row + j);
            j += 16;
        }
        while P::WIDE && n - j >= 8 {
            dot_tile::<P, G, 8>(d, group, at.add(j * d.rows.stride), row + j);
            j += 8;
        }
        while n - j >= 4 {
            dot_tile::<P, G, 4>(d, group, at.add(j * d.rows.stride), row + j);
            j += 4;
        }
        while n > j {
            dot_tile::<P, G, 1>(d, group, at.add(j * d.rows.stride), row + j);
            j += 1;
        }
    }
}

#[inline(always)]
unsafe fn dot_tile<P: Lanes, const G: usize, const T: usize>(
    d: &DotRows<'_>,
    group: usize,
    x: *const u8,
    row: usize,
) {
    // SAFETY: the groups and `T` rows lie inside of the caller's; what lies past `cols` is not written.
    unsafe {
        let mut acc = [[P::splat(0.0); T]; G];
        let w = d.panel.add(group * d.units * 64);
        let mut u = 0;
        if P::WIDE && G == 1 {
            while u + 8 <= d.units {
                add_units::<P, G, T, 8>(d, w, x, u, &mut acc);
                u += 8;
            }
        } else if P::WIDE {
            while u + 4 <= d.units {
                add_units::<P, G, T, 4>(d, w, x, u, &mut acc);
                u += 4;
            }
        }
        while u < d.units {
            add_units::<P, G, T, 1>(d, w, x, u, &mut acc);
            u += 1;
        }
        for i in 0..G {
            let first = (group + i) * GROUP_ROWS;
            for j in 0..T {
                let out = d.out.add((row + j) * d.out_stride + first);
                if d.cols - first >= GROUP_ROWS {
                    P::store(acc[i][j], out);
                } else {
                    let mut lanes = [0.0f32; GROUP_ROWS];
                    P::store(acc[i][j], lanes.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), out, d.cols - first);
                }
            }
        }
    }
}

/// `U` units stay in registers while the rows pass by.
#[inline(always)]
unsafe fn add_units<P: Lanes, const G: usize, const T: usize, const U: usize>(
    d: &DotRows<'_>,
    w: *const u8,
    x: *const u8,
    u: usize,
    acc: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the units inside of the panel and the rows. Loops, not closures: a closure that is not
    // inlined is compiled without the level's features.
    unsafe {
        let mut units = [[P::load_bf16(w.add(u * 64)); U]; G];
        for i in 0..G {
            for k in 0..U {
                units[i][k] = P::load_bf16(w.add((i * d.units + u + k) * 64));
            }
        }
        if T == 16 {
            // Sixteen rows are as many cache lines as they have units: each unit asks for one of the rows to come,
            // which sixteen streams side by side would wait for.
            for k in 0..U {
                P::prefetch(x.wrapping_add(T * d.rows.stride + (u + k) * 64));
            }
        }
        for j in 0..T {
            let x = x.add(j * d.rows.stride + u * 4);
            for k in 0..U {
                let pair = P::pair(x.add(k * 4));
                for i in 0..G {
                    acc[i][j] = P::dot_bf16(acc[i][j], units[i][k], pair);
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
            softmax::<S>(c, scores.add(lane), words.add(lane), keep.add(lane), width, lane);
            lane += S::LANES;
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

/// The weights of one vector of lanes as pairs of positions, and the running maxima and sums.
#[inline(always)]
unsafe fn softmax<S: Simd>(
    c: &AttendChunk<'_>,
    scores: *mut f32,
    words: *mut f32,
    keep: *mut f32,
    width: usize,
    lane: usize,
) {
    let n = c.keys.n;
    // SAFETY: `n` rows of scores; pairs of rows in `words`; whole groups.
    unsafe {
        let (maxima, sums) = (c.maxima.add(lane), c.sums.add(lane));
        let before = S::load(maxima);
        let mut max = before;
        for j in 0..n {
            max = max.max(S::load(scores.add(j * width)));
        }
        max.store(maxima);
        // A query that has seen nothing yet has no maximum: it must not become NaN.
        let minus = max.max(S::splat(f32::MIN)).mul(S::splat(-1.0));
        let before = before.max(S::splat(f32::MIN));
        let factor = exp2::<S>(before.add(minus));
        factor.store(keep);
        let mut sum = S::load(sums).mul(factor);
        let mut pair = [0.0f32; 32];
        for j in (0..n).step_by(2) {
            let even = exp2::<S>(S::load(scores.add(j * width)).add(minus));
            sum = sum.add(even);
            even.store(pair.as_mut_ptr());
            if j + 1 < n {
                let odd = exp2::<S>(S::load(scores.add((j + 1) * width)).add(minus));
                sum = sum.add(odd);
                odd.store(pair.as_mut_ptr().add(16));
            } else {
                S::splat(0.0).store(pair.as_mut_ptr().add(16));
            }
            let out = std::slice::from_raw_parts_mut(words.add(j / 2 * width).cast::<u32>(), S::LANES);
            for (i, out) in out.iter_mut().enumerate() {
                *out = nearest(pair[i]) >> 16 | nearest(pair[16 + i]) & 0xffff_0000;
            }
        }
        sum.store(sums);
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
                for v in 1..V {
                    pairs[v] = P::interleave(even.add(v * 32), odd.add(v * 32));
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

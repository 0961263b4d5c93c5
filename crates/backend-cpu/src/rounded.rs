//! Activations as packed weights take them: rounded once per use, then laid side by side for the tiles of a product.
//!
//! A rounded row is a list of words of four bytes: pairs of BF16, or per run of 128 columns a scale, minus the sums of
//! each 32 and of each 16 columns, those of 32 once more as bytes, and the columns as signed bytes. The rows of a tile
//! alternate word by word, so that a kernel walks one stream however many tokens it has; a tile of one token is the row
//! itself.

use std::ops::Range;

use oxseek_tensor::Error;

use crate::{
    memory::Shared,
    packed::{RUN, Rounding},
    simd::{Kernels, RowsRef},
    threads::Pool,
};

/// Words of one run of 8-bit activations: a scale, four sums, eight sums, four sums in bytes, 128 bytes.
pub(crate) const BYTE_RUN_WORDS: usize = 1 + 4 + 8 + 2 + RUN / 4;
/// Where a run's sums of 32 columns, its sums of 16 columns and its bytes begin, in words.
pub(crate) const SUMS_32: usize = 1;
pub(crate) const SUMS_16: usize = 5;
pub(crate) const CODES: usize = 15;
/// The sums of 32 columns divided by 2^[`SUM_SHIFT`], rounded down, a byte each, and after them what is left.
pub(crate) const SUMS_HIGH: usize = 13;
pub(crate) const SUMS_LOW: usize = 14;
/// A sum of 32 bytes is at most 4,064: both parts of it are signed bytes.
pub(crate) const SUM_SHIFT: u32 = 7;

impl Rounding {
    /// Words of 128 columns.
    pub(crate) const fn run_words(self) -> usize {
        match self {
            Self::Bf16 => RUN / 2,
            Self::Bytes => BYTE_RUN_WORDS,
        }
    }

    /// Words of a row.
    pub(crate) const fn row_words(self, cols: usize) -> usize {
        cols.div_ceil(RUN) * self.run_words()
    }
}

/// The tiles of `n` tokens, at most `most` wide and as even as they can be: first token and width of each.
pub(crate) fn tiles(n: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let count = n.div_ceil(most).max(1);
    let (width, wider) = (n / count, n % count);
    (0..count).map(move |i| (i * width + i.min(wider), width + usize::from(i < wider))).filter(|t| t.1 > 0)
}

/// Memory of rounded rows.
#[derive(Default)]
pub(crate) struct RoundedRows {
    words: Vec<f32>,
    row_words: usize,
}

impl RoundedRows {
    /// Makes room for `rows` rows of `cols` columns. Stale values stay.
    pub(crate) fn shape(&mut self, rounding: Rounding, rows: usize, cols: usize) {
        self.row_words = rounding.row_words(cols);
        if self.words.len() < rows * self.row_words {
            self.words.resize(rows * self.row_words, 0.0);
        }
    }

    pub(crate) fn view(&mut self) -> RowsMut {
        RowsMut { words: Shared::new(&mut self.words), row_words: self.row_words }
    }
}

/// Rows that tasks of a fork write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut {
    words: Shared,
    row_words: usize,
}

impl RowsMut {
    /// Rows or tiles from row `first` on.
    pub(crate) fn from(self, first: usize) -> RowsRef {
        RowsRef { words: self.words.at(first * self.row_words), row_words: self.row_words }
    }

    /// Rounds `n` values into a row on its own, from column `from` on, a multiple of 128; the run that they end in is
    /// padded with zeros.
    ///
    /// # Safety
    /// `n` values at `x`; the row and the columns were shaped; nobody else touches these runs of the row; the CPU has
    /// the features of `kernels`.
    #[allow(unsafe_code, reason = "a part of a buffer that several tasks fill")]
    pub(crate) unsafe fn round(
        self,
        kernels: &Kernels,
        rounding: Rounding,
        x: *const f32,
        n: usize,
        row: usize,
        from: usize,
    ) {
        let out = self.words.at(row * self.row_words + rounding.row_words(from));
        // SAFETY: the caller's promise; `from` is a whole number of runs.
        unsafe { kernels.round(rounding, x, n, out) }
    }

    /// Lays words `words` of a tile's rows side by side; the tile begins at row `first`.
    ///
    /// # Safety
    /// Each row has these words; rows `first..first + rows.len()` were shaped; nobody else touches these words of them.
    #[allow(unsafe_code, reason = "a part of a buffer that several tasks fill")]
    pub(crate) unsafe fn interleave(self, rows: &[*const f32], words: Range<usize>, first: usize) {
        // As integers: a word may look like a signalling NaN.
        let out = self.words.at(first * self.row_words + words.start * rows.len()).cast::<u32>();
        macro_rules! widths {
            ($($n:literal)*) => {
                match rows.len() {
                    // SAFETY: the caller's promise.
                    $($n => unsafe { alternate::<$n>(std::array::from_fn(|j| rows[j].cast()), words.len(), out) },)*
                    _ => unreachable!("a tile of {} tokens", rows.len()),
                }
            };
        }
        widths!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// `n` words of each row, in turns.
///
/// # Safety
/// Each row has these words, and `out` room for them all.
#[allow(unsafe_code, reason = "a part of a buffer that several tasks fill")]
unsafe fn alternate<const T: usize>(rows: [*const u32; T], n: usize, out: *mut u32) {
    for i in 0..n {
        for (j, row) in rows.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { out.add(i * T + j).write(row.add(i).read()) };
        }
    }
}

/// The activations that were rounded last, so that they are rounded once however many weights they meet.
#[derive(Default)]
pub(crate) struct LastInput {
    rows: RoundedRows,
    tiled: RoundedRows,
    /// Buffer, its version, the number of rows.
    pub(crate) of: Option<(u32, u64, usize)>,
    /// Whether the rows were laid side by side as well.
    pub(crate) is_tiled: bool,
}

/// Tasks of a rounding fork take so many values.
const VALUES_PER_TASK: usize = 32 << 10;

impl LastInput {
    /// Rounds `n` rows of `cols` values at `x`.
    ///
    /// # Errors
    /// Those of [`Pool::run`].
    #[allow(unsafe_code, reason = "rows become tasks")]
    pub(crate) fn round(
        &mut self,
        kernels: &Kernels,
        pool: &mut Pool,
        rounding: Rounding,
        x: &[f32],
        cols: usize,
    ) -> Result<(), Error> {
        let n = x.len() / cols;
        self.is_tiled = false;
        self.rows.shape(rounding, n, cols);
        let rows = self.rows.view();
        let chunk = VALUES_PER_TASK.div_ceil(cols);
        pool.run(n.div_ceil(chunk), &|task, _| {
            for (r, x) in x.chunks_exact(cols).enumerate().skip(task * chunk).take(chunk) {
                // SAFETY: `x` has `cols` values, and no other task touches the row.
                unsafe { rows.round(kernels, rounding, x.as_ptr(), cols, r, 0) };
            }
        })
    }

    /// Rows on their own.
    pub(crate) fn rows(&mut self) -> RowsRef {
        self.rows.view().from(0)
    }

    /// All `n` rows in tiles of at most `most`.
    ///
    /// # Errors
    /// Those of [`Pool::run`].
    pub(crate) fn tiled(&mut self, pool: &mut Pool, n: usize, most: usize) -> Result<RowsRef, Error> {
        if n == 1 {
            return Ok(self.rows());
        }
        if !self.is_tiled {
            let all: Vec<u32> = (0..n as u32).collect();
            let rows = self.rows();
            interleave(pool, &mut self.tiled, rows, &all, std::iter::once(0..n), most)?;
            self.is_tiled = true;
        }
        Ok(self.tiled.view().from(0))
    }
}

/// Lays the listed rows side by side in tiles of at most `most`: each of `lists` is a range of `picked`, and its tiles
/// lie at the same places of `out`. Lists of one row are left out: a row is its own tile.
///
/// # Errors
/// Those of [`Pool::run`].
#[allow(unsafe_code, reason = "tiles become tasks")]
pub(crate) fn interleave(
    pool: &mut Pool,
    out: &mut RoundedRows,
    rows: RowsRef,
    picked: &[u32],
    lists: impl Iterator<Item = Range<usize>>,
    most: usize,
) -> Result<(), Error> {
    out.row_words = rows.row_words;
    if out.words.len() < picked.len() * rows.row_words {
        out.words.resize(picked.len() * rows.row_words, 0.0);
    }
    let tiles: Vec<(usize, usize)> = lists
        .filter(|l| l.len() > 1)
        .flat_map(|l| tiles(l.len(), most).map(move |(t, width)| (l.start + t, width)))
        .collect();
    let out = out.view();
    let chunk = (VALUES_PER_TASK / (rows.row_words * most)).max(1);
    pool.run(tiles.len().div_ceil(chunk), &|task, _| {
        let mut sources = [std::ptr::null(); TILE_TOKENS_MAX];
        for &(first, width) in tiles.iter().skip(task * chunk).take(chunk) {
            for (source, &row) in sources.iter_mut().zip(&picked[first..first + width]) {
                *source = rows.row(row as usize);
            }
            // SAFETY: the rows were rounded; the tile has room for as many, and no other task touches it.
            unsafe { out.interleave(&sources[..width], 0..rows.row_words, first) };
        }
    })
}

/// Lays `n` rounded rows of `row_words` words side by side in tiles of at most `most`. One row is its own tile: `rows`
/// as they are.
#[allow(unsafe_code, reason = "tiles are written through a shared buffer")]
pub(crate) fn tile_rows(rows: &[f32], row_words: usize, n: usize, most: usize, out: &mut [f32]) -> RowsRef {
    if n <= 1 {
        return RowsRef { words: rows.as_ptr(), row_words };
    }
    assert!(out.len() >= n * row_words, "room for the rows");
    let out = RowsMut { words: Shared::new(out), row_words };
    for (first, width) in tiles(n, most) {
        let mut sources = [std::ptr::null(); TILE_TOKENS_MAX];
        for (source, row) in sources.iter_mut().zip(rows.chunks_exact(row_words).skip(first).take(width)) {
            *source = row.as_ptr();
        }
        // SAFETY: the rows have these words, and there is room for all tiles.
        unsafe { out.interleave(&sources[..width], 0..row_words, first) };
    }
    out.from(0)
}

/// Most tokens of a tile at any level: the widths that products and [`RowsMut::interleave`] list.
pub(crate) const TILE_TOKENS_MAX: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_even_and_whole() {
        for most in 1..=12 {
            for n in 0..=100 {
                let all: Vec<_> = tiles(n, most).collect();
                let mut next = 0;
                for &(first, width) in &all {
                    assert_eq!(first, next);
                    assert!(width <= most && width + 1 >= all[0].1);
                    next += width;
                }
                assert_eq!(next, n);
            }
        }
    }
}

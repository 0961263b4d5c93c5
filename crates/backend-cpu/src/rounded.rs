//! Activations as packed weights take them: rounded once per use, one row per token.

use crate::{
    packed::{RUN, Rounding},
    simd::{Kernels, RowsRef},
};

/// Columns of one sum of 8-bit activations: a block of the formats that they meet.
pub(crate) const SUM_COLUMNS: usize = 32;

/// Rows of rounded activations, each padded with zeros to whole runs of 128 columns.
#[derive(Default)]
pub(crate) struct RoundedRows {
    data: Vec<u8>,
    scales: Vec<f32>,
    minus_sums: Vec<i32>,
    runs: usize,
    row_bytes: usize,
}

impl RoundedRows {
    /// Makes room for `rows` rows of `cols` columns. Stale values stay.
    pub(crate) fn shape(&mut self, rounding: Rounding, rows: usize, cols: usize) {
        self.runs = cols.div_ceil(RUN);
        let element = if rounding == Rounding::Bf16 { 2 } else { 1 };
        // A cache line more than it takes: rows whose distance is a multiple of 4 KiB share one set of the L1 cache,
        // and a tile walks twelve of them side by side.
        self.row_bytes = self.runs * RUN * element + 64;
        grow(&mut self.data, rows * self.row_bytes);
        if rounding == Rounding::Bytes {
            grow(&mut self.scales, rows * self.runs);
            grow(&mut self.minus_sums, rows * self.runs * (RUN / SUM_COLUMNS));
        }
    }

    pub(crate) fn view(&mut self) -> RowsMut {
        RowsMut(RowsRef {
            data: self.data.as_mut_ptr(),
            row_bytes: self.row_bytes,
            scales: self.scales.as_mut_ptr(),
            row_scales: self.runs,
            minus_sums: self.minus_sums.as_mut_ptr(),
            row_sums: self.runs * (RUN / SUM_COLUMNS),
        })
    }
}

/// Which input was rounded last, so that it is rounded once however many weights it meets.
#[derive(Default)]
pub(crate) struct LastInput {
    pub(crate) rows: RoundedRows,
    /// Buffer, its version and the number of rows.
    pub(crate) of: Option<(u32, u64, usize)>,
}

fn grow<T: Default + Clone>(list: &mut Vec<T>, len: usize) {
    if list.len() < len {
        list.resize(len, T::default());
    }
}

/// Rows that tasks of a fork write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut(RowsRef);

impl RowsMut {
    pub(crate) fn rows(self) -> RowsRef {
        self.0
    }

    /// Rounds `n` values into `row` from column `from` on, a multiple of 128; the run that they end in is padded.
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
        let r = &self.0;
        // SAFETY: the caller's promise; `from` is a whole number of runs.
        unsafe {
            match rounding {
                Rounding::Bf16 => {
                    let out = r.data.add(row * r.row_bytes + from * 2).cast_mut();
                    (kernels.round_bf16)(x, n, out.cast());
                }
                Rounding::Bytes => (kernels.round_bytes)(
                    x,
                    n,
                    r.data.add(row * r.row_bytes + from).cast_mut().cast(),
                    r.scales.add(row * r.row_scales + from / RUN).cast_mut(),
                    r.minus_sums.add(row * r.row_sums + from / SUM_COLUMNS).cast_mut(),
                ),
            }
        }
    }
}

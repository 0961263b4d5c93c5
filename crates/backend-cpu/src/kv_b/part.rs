//! The two products of absorbed attention: latent values from a query, a value from a weighted sum of latent rows.

use std::ops::Range;

use oxseek_tensor::{Error, HostMatrix};

use super::Panels;
use crate::{
    huge::{Arena, HugeBytes},
    memory::Bytes,
    packed::{GROUP_ROWS, PackedFormat, PanelRef, Rounding, pack_group},
    rounded::tile_rows,
    simd::{
        Kernels, Output, PanelGemm,
        attention::{DotRows, RowRuns},
    },
    threads::Pool,
};

/// Most rows of a product.
pub(crate) const ROWS: usize = 16;

static IDENTITY: [u32; ROWS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// What each head multiplies its rows with.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    /// BF16.
    Panels(Panels),
    /// The blocks of the file: the rows of all heads below each other, `rows` for each, in whole groups.
    Blocks { w: PanelRef, rows: usize },
}

/// At most [`ROWS`] rows of one head, rounded as its [`Part`] asks, each of whole runs.
pub(crate) struct RoundedInputs<'a> {
    pub(crate) words: &'a [f32],
    pub(crate) row_words: usize,
    pub(crate) n: usize,
    /// Room for as many words, which may be empty for [`Rounding::Bf16`].
    pub(crate) tiled: &'a mut [f32],
}

impl Part {
    /// Packs a matrix of `rows` rows for each head, if it is in blocks and heads begin at whole groups.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or what the pool answers.
    pub(super) fn in_blocks(
        m: &HostMatrix,
        rows: usize,
        all: &mut Vec<HugeBytes>,
        arena: &mut Arena,
        pool: &mut Pool,
    ) -> Result<Option<Self>, Error> {
        let format = PackedFormat::of(m.dtype()).filter(|f| f.rounding() == Rounding::Bytes);
        let Some(format) = format.filter(|_| rows.is_multiple_of(GROUP_ROWS)) else {
            return Ok(None);
        };
        let layout = PanelRef::layout(format, m.rows(), m.cols());
        let mut bytes = arena.alloc(layout.groups() * layout.group_bytes)?;
        let out = Bytes::new(bytes.as_mut());
        pool.run(layout.groups(), &|group, _| {
            let at = out.at(group * layout.group_bytes);
            // SAFETY: this group's part of the buffer, which no other task touches.
            pack_group(m, format, group, unsafe { std::slice::from_raw_parts_mut(at, layout.group_bytes) });
        })?;
        let w = PanelRef { data: bytes.as_ptr(), ..layout };
        all.push(bytes);
        Ok(Some(Self::Blocks { w, rows }))
    }

    /// What its inputs are rounded to.
    pub(crate) fn rounding(&self) -> Rounding {
        match self {
            Self::Panels(_) => Rounding::Bf16,
            Self::Blocks { w, .. } => w.format.rounding(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Panels(p) => p.bytes(),
            Self::Blocks { w, .. } => w.groups() * w.group_bytes,
        }
    }

    /// Outputs `outputs` of a head, which begin at a whole group, for each row of `x`, `out_stride` apart.
    ///
    /// # Safety
    /// The head and its outputs are there; the rows are as wide as its inputs, padded with zeros; `out` has room; the
    /// CPU has the features of `kernels`.
    pub(crate) unsafe fn multiply(
        &self,
        kernels: &Kernels,
        head: usize,
        outputs: Range<usize>,
        x: &mut RoundedInputs<'_>,
        out: &mut [f32],
        out_stride: usize,
    ) {
        match *self {
            Self::Panels(p) => {
                let runs = [x.words.as_ptr().cast()];
                let d = DotRows {
                    panel: p.at(head, outputs.start / GROUP_ROWS),
                    units: p.units,
                    cols: outputs.len(),
                    rows: RowRuns::new(&runs, ROWS, x.row_words * 4, x.n),
                    out: out.as_mut_ptr(),
                    out_stride,
                };
                // SAFETY: the caller's promise.
                unsafe { (kernels.dot_rows)(&d) }
            }
            Self::Blocks { w, rows } => {
                let most = kernels.tile_tokens(w.format.rounding());
                let first = (head * rows + outputs.start) / GROUP_ROWS;
                let g = PanelGemm {
                    w,
                    groups: first..first + outputs.len().div_ceil(GROUP_ROWS),
                    x: tile_rows(x.words, x.row_words, x.n, most, x.tiled),
                    out: out.as_mut_ptr(),
                    out_stride,
                    out_rows: &IDENTITY[..x.n],
                    output: Output::Store,
                    then: w.group(first + rows / GROUP_ROWS),
                };
                // SAFETY: the caller's promise; heads are whole groups.
                unsafe { (kernels.panel_gemm)(&g) }
            }
        }
    }
}

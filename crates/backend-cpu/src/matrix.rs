//! A weight, and its products with activations: exact from the bytes as stored, or packed.
#![allow(unsafe_code, reason = "hands weights to kernels as pointers")]

use std::ops::Range;

use oxseek_tensor::HostMatrix;

use crate::{
    packed::{GROUP_ROWS, Packed, PackedFormat, PanelRef, Rounding, pack_group},
    simd::{Gemm, Kernels, Output, PanelGemm, RowsRef, WeightRef},
};

/// F32 rows that the panel of a thread holds at least, of any matrix: two groups of 16 BF16 rows.
pub(crate) const PANEL_ROWS_MIN: usize = 16;
/// Groups that are packed at a time when a matrix is used before it was packed.
const GROUPS_PACKED: usize = 2;

/// A loaded weight.
pub(crate) struct Matrix {
    stored: HostMatrix,
    /// The layout that its products use; `None` multiplies exactly.
    format: Option<PackedFormat>,
    packed: Option<Packed>,
}

impl Matrix {
    pub(crate) fn new(stored: HostMatrix, format: Option<PackedFormat>) -> Self {
        Self { stored, format, packed: None }
    }

    pub(crate) fn stored(&self) -> &HostMatrix {
        &self.stored
    }

    pub(crate) fn set_packed(&mut self, packed: Packed) {
        self.packed = Some(packed);
    }

    pub(crate) fn factor(&self) -> MatrixRef {
        MatrixRef {
            weight: WeightRef::new(&self.stored),
            rows: self.stored.rows(),
            cols: self.stored.cols(),
            bytes: self.stored.total_bytes(),
            stored: &raw const self.stored,
            format: self.format,
            panel: self.packed.as_ref().map(Packed::panel),
        }
    }
}

/// A weight while an op runs: the backend that owns it is borrowed meanwhile, and takes nothing away.
#[derive(Clone, Copy)]
pub(crate) struct MatrixRef {
    weight: WeightRef,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// What one full read moves.
    pub(crate) bytes: usize,
    stored: *const HostMatrix,
    format: Option<PackedFormat>,
    panel: Option<PanelRef>,
}

// SAFETY: it only points to weights, which nobody writes.
unsafe impl Send for MatrixRef {}
// SAFETY: as above.
unsafe impl Sync for MatrixRef {}

/// Activations in every form that a product may ask for.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    pub(crate) exact: *const f32,
    pub(crate) stride: usize,
    /// By [`Rounding`], the tiles of the listed rows; present for the roundings of the weights that they meet.
    pub(crate) rounded: [Option<RowsRef>; 2],
}

// SAFETY: it only points to activations, which nobody writes during the fork.
unsafe impl Send for Inputs {}
// SAFETY: as above.
unsafe impl Sync for Inputs {}

/// Rows `rows` of a weight times the listed rows of the inputs; the fields are those of [`Gemm`].
pub(crate) struct Product<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) x: Inputs,
    pub(crate) tokens: &'a [u32],
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    pub(crate) out_rows: &'a [u32],
    pub(crate) output: Output<'a>,
    /// Weights of the same shape that this thread is likely to read next ([`MatrixRef::place`]), or null.
    pub(crate) then: *const u8,
}

impl MatrixRef {
    /// Where row `row` is read from, or null when that is made up on the way.
    pub(crate) fn place(&self, row: usize) -> *const u8 {
        self.panel.map_or(std::ptr::null(), |w| w.group(row / GROUP_ROWS))
    }

    /// What its inputs are rounded to.
    pub(crate) fn rounding(&self) -> Option<Rounding> {
        self.format.map(PackedFormat::rounding)
    }

    /// # Safety
    /// As [`Gemm`] and [`PanelGemm`] say; `p.rows` begins at a whole group, and `panel` has `panel_len` values, enough
    /// for [`PANEL_ROWS_MIN`] rows.
    pub(crate) unsafe fn multiply(&self, kernels: &Kernels, p: &Product<'_>, panel: &mut [f32]) {
        let Some(format) = self.format else {
            let g = Gemm {
                w: self.weight,
                rows: p.rows.clone(),
                x: p.x.exact,
                x_stride: p.x.stride,
                tokens: p.tokens,
                out: p.out,
                out_stride: p.out_stride,
                out_rows: p.out_rows,
                output: p.output,
                panel: panel.as_mut_ptr(),
                panel_len: panel.len(),
            };
            // SAFETY: the caller's promise.
            return unsafe { (kernels.gemm)(&g) };
        };
        let Some(x) = p.x.rounded[format.rounding() as usize] else {
            unreachable!("inputs were rounded for every weight that they meet");
        };
        let groups = p.rows.start / GROUP_ROWS..p.rows.end.div_ceil(GROUP_ROWS);
        let part = |w: PanelRef, groups: Range<usize>| PanelGemm {
            w,
            out: p.out.wrapping_add((groups.start - p.rows.start / GROUP_ROWS) * GROUP_ROWS),
            groups,
            x,
            out_stride: p.out_stride,
            out_rows: p.out_rows,
            output: p.output,
            then: p.then,
        };
        if let Some(w) = self.panel {
            // SAFETY: the caller's promise.
            return unsafe { (kernels.panel_gemm)(&part(w, groups)) };
        }
        let layout = PanelRef::layout(format, self.rows, self.cols);
        // SAFETY: the backend that owns the matrix is borrowed while the op runs; the panel is this thread's, and bytes
        // may be written over its values.
        unsafe {
            let (stored, bytes) = (&*self.stored, panel.as_mut_ptr().cast::<u8>());
            for first in groups.clone().step_by(GROUPS_PACKED) {
                let end = groups.end.min(first + GROUPS_PACKED);
                assert!(
                    (end - first) * layout.group_bytes <= size_of_val(panel),
                    "the panel holds two groups"
                );
                for group in first..end {
                    let at = bytes.add((group - first) * layout.group_bytes);
                    let out = std::slice::from_raw_parts_mut(at, layout.group_bytes);
                    pack_group(stored, format, group, out);
                }
                let data = bytes.wrapping_sub(first * layout.group_bytes).cast_const();
                (kernels.panel_gemm)(&part(PanelRef { data, ..layout }, first..end));
            }
        }
    }
}

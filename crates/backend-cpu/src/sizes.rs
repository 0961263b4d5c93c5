//! What weights will take, known before any is loaded.

use oxseek_tensor::{DType, backend::MultiplyAdds};

use crate::{
    Precision,
    packed::{PackedFormat, PanelRef, Rounding},
};

/// What the CPU backend makes of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixCost {
    /// Bytes of its packed copy; `None` when it is used as stored.
    pub packed_bytes: Option<u64>,
    /// Multiply-adds with one row of activations.
    pub multiply_adds: MultiplyAdds,
}

impl Precision {
    /// What a matrix `[rows, cols]` in a storage format costs.
    pub fn matrix_cost(self, dtype: DType, rows: usize, cols: usize) -> MatrixCost {
        let format = self.packed_format(dtype);
        let layout = format.map(|f| PanelRef::layout(f, rows, cols));
        let n = (rows as u64).saturating_mul(cols as u64);
        MatrixCost {
            packed_bytes: layout.map(|l| (l.groups() as u64).saturating_mul(l.group_bytes as u64)),
            multiply_adds: multiply_adds(format.map(PackedFormat::rounding), n),
        }
    }

    /// The layout that products use; `None` multiplies exactly, as stored.
    pub(crate) fn packed_format(self, dtype: DType) -> Option<PackedFormat> {
        match self {
            Precision::Exact => None,
            Precision::Native => PackedFormat::of(dtype),
        }
    }
}

/// `n` multiply-adds of the kind that a rounding asks for.
pub(crate) fn multiply_adds(rounding: Option<Rounding>, n: u64) -> MultiplyAdds {
    match rounding {
        None => MultiplyAdds { f32: n, ..MultiplyAdds::default() },
        Some(Rounding::Bf16) => MultiplyAdds { bf16: n, ..MultiplyAdds::default() },
        Some(Rounding::Bytes) => MultiplyAdds { bytes: n, ..MultiplyAdds::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_packed_in_whole_groups() {
        let cost = Precision::Native.matrix_cost(DType::Q8_0, 17, 64);
        assert_eq!(cost.packed_bytes, Some(2 * 16 * 2 * 34));
        assert_eq!(cost.multiply_adds, MultiplyAdds { bytes: 17 * 64, ..MultiplyAdds::default() });
        assert_eq!(Precision::Native.matrix_cost(DType::BF16, 16, 4).packed_bytes, Some(128));
    }

    #[test]
    fn exact_products_use_weights_as_stored() {
        for (precision, dtype) in [(Precision::Exact, DType::Q4K), (Precision::Native, DType::F32)] {
            let cost = precision.matrix_cost(dtype, 3, 256);
            assert_eq!(cost.packed_bytes, None);
            assert_eq!(cost.multiply_adds.f32, 768);
        }
    }
}

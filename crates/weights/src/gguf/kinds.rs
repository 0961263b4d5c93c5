//! Tensor types: what a file calls them and how many bytes they take.

use oxseek_tensor::DType;

/// A tensor's type as GGUF numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgmlType {
    code: u32,
    name: &'static str,
    block_len: u16,
    block_bytes: u16,
}

/// Code, name, elements of a block, bytes of a block. Those without a kernel are here so that a file that has them can
/// be read, listed and refused by name. Codes that are missing were given up.
const TYPES: [(u32, &str, u16, u16); 33] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
];

impl GgmlType {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        TYPES.into_iter().map(|(code, name, block_len, block_bytes)| Self {
            code,
            name,
            block_len,
            block_bytes,
        })
    }

    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::all().find(|t| t.code == code)
    }

    /// The type that stores `dtype`; `None` for a format that GGUF has not.
    pub fn of(dtype: DType) -> Option<Self> {
        Self::all().find(|t| t.name == dtype.name())
    }

    /// The format that reads this type; `None` when there is none.
    pub fn dtype(self) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == self.name)
    }

    /// The name that users know.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Elements of a block.
    pub fn block_len(self) -> usize {
        self.block_len.into()
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.block_bytes.into()
    }

    pub(super) fn code(self) -> u32 {
        self.code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_those_of_the_formats() {
        for dtype in DType::ALL {
            if let Some(t) = GgmlType::of(dtype) {
                assert_eq!((t.block_len(), t.block_bytes()), (dtype.block_len(), dtype.block_bytes()));
                assert_eq!(t.dtype(), Some(dtype));
            }
        }
        assert!(GgmlType::of(DType::F32).is_some() && GgmlType::of(DType::Q4K).is_some());
        assert!(GgmlType::of(DType::F8E4M3).is_none());
    }

    #[test]
    fn a_type_that_was_given_up_is_unknown() {
        for code in [4, 5, 31, 38, 1000, u32::MAX] {
            assert_eq!(GgmlType::from_code(code), None);
        }
        assert_eq!(GgmlType::from_code(30).map(GgmlType::name), Some("BF16"));
    }
}

//! A weight as it lies in a file: bytes in their storage format, never expanded.

use std::{fmt, ops::Range, sync::Arc};

use crate::{
    DType, Error, blocks,
    dtype::{E4M3_TABLE, FP8_BLOCK, bf16_to_f32, f16_to_f32},
};

/// Bytes that somebody else keeps alive: a mapped file, an embedded model, a `Vec`.
#[derive(Clone)]
pub struct ByteRegion {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    /// Gives the memory of a range of the owner's bytes back to the system, which can read them again.
    release: Option<Arc<dyn Fn(Range<usize>) + Send + Sync>>,
}

impl ByteRegion {
    /// The `range` of `owner`'s bytes; `None` when it does not lie inside them.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        let len = (*owner).as_ref().len();
        (range.start <= range.end && range.end <= len).then_some(Self { owner, range, release: None })
    }

    /// All of `owner`'s bytes.
    pub fn whole(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { owner, range, release: None }
    }

    /// The same bytes, of which `release` can give the memory of any range back to the system: reading them later
    /// brings it again, at the price of reading the file.
    #[must_use]
    pub fn with_release(self, release: Arc<dyn Fn(Range<usize>) + Send + Sync>) -> Self {
        Self { release: Some(release), ..self }
    }

    /// Says that these bytes will hardly be read again; the memory of a mapped file goes back to the system.
    pub fn release(&self) {
        if let Some(release) = &self.release {
            release(self.range.clone());
        }
    }

    /// All of `bytes`.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self::whole(Arc::new(bytes))
    }

    /// A part of this region; `None` when it does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self {
            owner: Arc::clone(&self.owner),
            range: start..start + range.len(),
            release: self.release.clone(),
        })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for ByteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ByteRegion({} bytes)", self.range.len())
    }
}

/// A row-major matrix `[rows, cols]` in its storage format; `y = x * W^T` takes `cols` in and gives `rows`.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: ByteRegion,
    /// FP8 only: multipliers, row-major `[ceil(rows/128), ceil(cols/128)]`.
    scales: Option<Arc<[f32]>>,
    /// INT4 only: BF16 multipliers, row-major `[rows, cols/32]`.
    group_scales: Option<ByteRegion>,
}

impl HostMatrix {
    /// A matrix whose bytes and scales are proven to fit its shape.
    ///
    /// # Errors
    /// [`Error::MatrixBytes`], [`Error::ScaleGrid`] (also when a format that has no scales is given some) or
    /// [`Error::Overflow`].
    pub fn new(
        dtype: DType,
        rows: usize,
        cols: usize,
        data: ByteRegion,
        scales: Option<Arc<[f32]>>,
    ) -> Result<Self, Error> {
        if !cols.is_multiple_of(dtype.block_len()) {
            return Err(Error::Blocks { rows, cols, dtype: dtype.name(), block: dtype.block_len() });
        }
        let expected = dtype
            .row_bytes(cols)
            .and_then(|n| n.checked_mul(rows))
            .ok_or(Error::Overflow { what: "matrix" })?;
        let found = data.bytes().len();
        if expected != found {
            return Err(Error::MatrixBytes { rows, cols, dtype: dtype.name(), expected, found });
        }
        let grid = match dtype {
            // Its scales are no F32.
            DType::INT4 => {
                return Err(Error::ScaleGrid { rows, cols, expected: rows * (cols / 32), found: 0 });
            }
            DType::F8E4M3 => rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK),
            _ => 0,
        };
        let found = scales.as_ref().map_or(0, |s| s.len());
        if grid != found {
            return Err(Error::ScaleGrid { rows, cols, expected: grid, found });
        }
        Ok(Self { dtype, rows, cols, data, scales, group_scales: None })
    }

    /// An INT4 matrix: `codes` are its nibbles (`[rows, cols/2]` bytes), `scales` a BF16 per 32 columns
    /// (`[rows, cols/32]`).
    ///
    /// # Errors
    /// [`Error::Blocks`], [`Error::MatrixBytes`], [`Error::ScaleGrid`] or [`Error::Overflow`].
    pub fn int4(rows: usize, cols: usize, codes: ByteRegion, scales: ByteRegion) -> Result<Self, Error> {
        let dtype = DType::INT4;
        if !cols.is_multiple_of(dtype.block_len()) {
            return Err(Error::Blocks { rows, cols, dtype: dtype.name(), block: dtype.block_len() });
        }
        let overflow = Error::Overflow { what: "matrix" };
        let expected = dtype.row_bytes(cols).and_then(|n| n.checked_mul(rows)).ok_or(overflow)?;
        let found = codes.bytes().len();
        if expected != found {
            return Err(Error::MatrixBytes { rows, cols, dtype: dtype.name(), expected, found });
        }
        // Smaller than the codes, so it does not overflow.
        let expected = rows * (cols / dtype.block_len());
        let found = scales.bytes().len() / 2;
        if scales.bytes().len() != expected * 2 {
            return Err(Error::ScaleGrid { rows, cols, expected, found });
        }
        Ok(Self { dtype, rows, cols, data: codes, scales: None, group_scales: Some(scales) })
    }

    /// An F32 matrix made from values, for tests and small host-made weights.
    ///
    /// # Errors
    /// [`Error::MatrixBytes`] when `values` has another length than `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, Error> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(DType::F32, rows, cols, ByteRegion::from_vec(bytes), None)
    }

    /// Storage format.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows: the outputs of `y = x * W^T`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the inputs of `y = x * W^T`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All rows, packed.
    pub fn data(&self) -> &[u8] {
        self.data.bytes()
    }

    /// Says that the stored bytes will hardly be read again, see [`ByteRegion::release`].
    pub fn release(&self) {
        self.data.release();
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// FP8 only: multipliers, row-major `[ceil(rows/128), ceil(cols/128)]`.
    pub fn scales(&self) -> Option<&[f32]> {
        self.scales.as_deref()
    }

    /// Bytes that one full read of the matrix moves, scales included.
    pub fn total_bytes(&self) -> usize {
        let groups = self.group_scales().map_or(0, <[u8]>::len);
        self.data.bytes().len() + self.scales.as_ref().map_or(0, |s| s.len() * 4) + groups
    }

    /// INT4 only: BF16 multipliers, row-major `[rows, cols/32]`.
    pub fn group_scales(&self) -> Option<&[u8]> {
        self.group_scales.as_ref().map(ByteRegion::bytes)
    }

    /// Writes row `row` as F32 into `out` (`cols` long): the scalar truth of every storage format.
    ///
    /// # Panics
    /// When `row` is out of range or `out` has another length than `cols`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "decode_row: out must hold one row");
        let n = self.row_bytes();
        let bytes = &self.data.bytes()[row * n..(row + 1) * n];
        match self.dtype {
            DType::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16_to_f32(u16::from_le_bytes([b[0], b[1]]));
                }
            }
            DType::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16_to_f32(u16::from_le_bytes([b[0], b[1]]));
                }
            }
            DType::F8E4M3 => {
                let grid = self.cols.div_ceil(FP8_BLOCK);
                let scales = self.scales.as_deref().unwrap_or_default();
                let scales = &scales[row / FP8_BLOCK * grid..][..grid];
                for ((o, b), s) in out.chunks_mut(FP8_BLOCK).zip(bytes.chunks(FP8_BLOCK)).zip(scales) {
                    for (o, &code) in o.iter_mut().zip(b) {
                        *o = E4M3_TABLE[code as usize] * s;
                    }
                }
            }
            DType::INT4 => {
                let n = self.cols / self.dtype.block_len() * 2;
                let scales = self.group_scales().unwrap_or_default();
                blocks::decode_int4(bytes, &scales[row * n..][..n], out);
            }
            _ => blocks::decode_row(self.dtype, bytes, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_must_fit_the_shape() {
        let err = HostMatrix::new(DType::BF16, 2, 3, ByteRegion::from_vec(vec![0; 11]), None).unwrap_err();
        assert_eq!(err, Error::MatrixBytes { rows: 2, cols: 3, dtype: "BF16", expected: 12, found: 11 });
        let err = HostMatrix::new(DType::F32, usize::MAX, 2, ByteRegion::from_vec(vec![]), None).unwrap_err();
        assert_eq!(err, Error::Overflow { what: "matrix" });
    }

    #[test]
    fn fp8_needs_a_ceil_grid_of_scales() {
        let data = ByteRegion::from_vec(vec![0x38; 130 * 200]);
        let short: Arc<[f32]> = vec![1.0; 3].into();
        let err = HostMatrix::new(DType::F8E4M3, 130, 200, data.clone(), Some(short)).unwrap_err();
        assert_eq!(err, Error::ScaleGrid { rows: 130, cols: 200, expected: 4, found: 3 });
        let grid: Arc<[f32]> = vec![1.0, 2.0, 3.0, 4.0].into();
        let m = HostMatrix::new(DType::F8E4M3, 130, 200, data, Some(grid)).unwrap();
        let mut row = vec![0.0; 200];
        m.decode_row(129, &mut row);
        assert_eq!((row[127], row[128]), (3.0, 4.0));
    }

    #[test]
    fn int4_needs_a_scale_per_block() {
        let region = |n: usize| ByteRegion::from_vec(vec![0x9a; n]);
        let grid = Error::ScaleGrid { rows: 3, cols: 64, expected: 6, found: 5 };
        assert_eq!(HostMatrix::int4(3, 64, region(96), region(10)).unwrap_err(), grid);
        assert_eq!(HostMatrix::int4(3, 64, region(96), region(11)).unwrap_err(), grid);
        let grid = Error::ScaleGrid { rows: 3, cols: 64, expected: 6, found: 0 };
        assert_eq!(HostMatrix::new(DType::INT4, 3, 64, region(96), None).unwrap_err(), grid);
        let bytes = Error::MatrixBytes { rows: 3, cols: 64, dtype: "INT4", expected: 96, found: 95 };
        assert_eq!(HostMatrix::int4(3, 64, region(95), region(12)).unwrap_err(), bytes);
        assert!(matches!(HostMatrix::int4(3, 48, region(72), region(9)), Err(Error::Blocks { .. })));
        let mut scales = vec![0; 12];
        scales[10..].copy_from_slice(&[0x80, 0x3f]);
        let m = HostMatrix::int4(3, 64, region(96), ByteRegion::from_vec(scales)).unwrap();
        let mut row = vec![0.0; 64];
        m.decode_row(2, &mut row);
        assert_eq!((row[31], row[32], row[33], m.total_bytes()), (0.0, 2.0, 1.0, 108));
    }

    #[test]
    fn a_part_releases_its_own_bytes() {
        let released = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = Arc::clone(&released);
        let all =
            ByteRegion::from_vec(vec![7; 10]).with_release(Arc::new(move |r| seen.lock().unwrap().push(r)));
        let part = all.slice(2..9).and_then(|p| p.slice(1..3)).unwrap();
        part.release();
        assert_eq!(part.bytes(), [7, 7]);
        let released = released.lock().unwrap();
        assert_eq!((released.len(), &released[0]), (1, &(3..5)));
        ByteRegion::from_vec(vec![1]).release();
    }

    #[test]
    fn a_region_stays_inside_its_owner() {
        let r = ByteRegion::from_vec(vec![1, 2, 3, 4]);
        assert_eq!(r.slice(1..3).map(|s| s.bytes().to_vec()), Some(vec![2, 3]));
        assert!(r.slice(1..3).and_then(|s| s.slice(0..3)).is_none());
        assert!(r.slice(3..5).is_none());
    }
}

//! Weights laid out for the kernels of `simd/panel.rs`: the same bits in another order, never expanded.
//!
//! Sixteen rows form a group; padding repeats the last row. Within a group, four bytes of each row alternate, so that
//! 64 bytes are one vector of sixteen rows: two BF16, four FP8 codes, four bytes of a block.

#![allow(unsafe_code, reason = "layouts that threads share as pointers")]

use oxseek_tensor::{DType, Error, HostMatrix};

use crate::{
    huge::{Arena, HugeBytes},
    numa::Nodes,
};

mod parts;
mod squares;

use squares::{Square, prefetch, turn_pairs, turn_words};

/// Rows of a group.
pub(crate) const GROUP_ROWS: usize = 16;
/// Columns that share a scale of FP8 weights or of 8-bit activations.
pub(crate) const RUN: usize = 128;
/// Bytes of 16 rows of one FP8 block.
pub(crate) const E4M3_BLOCK_BYTES: usize = GROUP_ROWS * RUN;

/// Storage formats that have a packed layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackedFormat {
    Bf16,
    E4m3,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
    Int4,
}

/// What activations are rounded to before they meet a format's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// BF16.
    Bf16,
    /// Signed bytes with a scale per 128 columns.
    Bytes,
}

impl PackedFormat {
    pub(crate) fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 | DType::F16 => None,
            DType::BF16 => Some(Self::Bf16),
            DType::F8E4M3 => Some(Self::E4m3),
            DType::Q8_0 => Some(Self::Q8_0),
            DType::Q4_0 => Some(Self::Q4_0),
            DType::Q4_1 => Some(Self::Q4_1),
            DType::Q5_0 => Some(Self::Q5_0),
            DType::Q5_1 => Some(Self::Q5_1),
            DType::Q2K => Some(Self::Q2K),
            DType::Q3K => Some(Self::Q3K),
            DType::Q4K => Some(Self::Q4K),
            DType::Q5K => Some(Self::Q5K),
            DType::Q6K => Some(Self::Q6K),
            DType::IQ4_NL => Some(Self::Iq4Nl),
            DType::IQ4_XS => Some(Self::Iq4Xs),
            DType::MXFP4 => Some(Self::Mxfp4),
            DType::INT4 => Some(Self::Int4),
        }
    }

    pub(crate) fn rounding(self) -> Rounding {
        match self {
            Self::Bf16 | Self::E4m3 => Rounding::Bf16,
            _ => Rounding::Bytes,
        }
    }

    /// Bytes before the codes of an FP8 group: its scales, in whole cache lines.
    const fn header_bytes(self, cols: usize) -> usize {
        match self {
            Self::E4m3 => (cols.div_ceil(RUN) * 4).next_multiple_of(64),
            _ => 0,
        }
    }

    /// Bytes of sixteen rows of `cols` columns.
    pub(crate) const fn group_bytes(self, cols: usize) -> usize {
        match self {
            Self::Bf16 => cols.div_ceil(2) * 64,
            Self::E4m3 => self.header_bytes(cols) + cols.div_ceil(RUN) * E4M3_BLOCK_BYTES,
            Self::Int4 => cols / 32 * 18 * GROUP_ROWS,
            _ => match self.blocks() {
                Some(blocks) => blocks.group_bytes(cols),
                None => 0,
            },
        }
    }
}

/// A packed matrix as kernels see it.
#[derive(Clone, Copy)]
pub(crate) struct PanelRef {
    pub(crate) format: PackedFormat,
    pub(crate) data: *const u8,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) group_bytes: usize,
    pub(crate) header_bytes: usize,
}

// SAFETY: it only points to weights, which nobody writes.
unsafe impl Send for PanelRef {}
// SAFETY: as above.
unsafe impl Sync for PanelRef {}

impl PanelRef {
    /// The layout of a matrix in `format`, without data.
    pub(crate) fn layout(format: PackedFormat, rows: usize, cols: usize) -> Self {
        let (group_bytes, header_bytes) = (format.group_bytes(cols), format.header_bytes(cols));
        Self { format, data: std::ptr::null(), rows, cols, group_bytes, header_bytes }
    }

    /// Where a group begins.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "part of the innermost kernels")]
    pub(crate) fn group(&self, group: usize) -> *const u8 {
        self.data.wrapping_add(group * self.group_bytes)
    }

    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }
}

/// A packed matrix in memory of its own.
pub(crate) struct Packed {
    panel: PanelRef,
    _bytes: HugeBytes,
}

impl Packed {
    /// Packs all of `m`, each node's groups on a thread of that node: the calling one, which goes from node to node.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn new(
        m: &HostMatrix,
        format: PackedFormat,
        arena: &mut Arena,
        nodes: &Nodes,
    ) -> Result<Self, Error> {
        let layout = PanelRef::layout(format, m.rows(), m.cols());
        let mut bytes = arena.alloc(layout.groups() * layout.group_bytes)?;
        let mut groups = bytes.as_mut().chunks_exact_mut(layout.group_bytes).enumerate();
        for node in 0..nodes.count() {
            nodes.enter(node);
            for (group, out) in groups.by_ref().take(nodes.range(node, layout.groups()).len()) {
                pack_group(m, format, group, out);
            }
        }
        Ok(Self { panel: PanelRef { data: bytes.as_ptr(), ..layout }, _bytes: bytes })
    }

    pub(crate) fn panel(&self) -> PanelRef {
        self.panel
    }
}

/// Packs the sixteen rows of one group into `out`.
pub(crate) fn pack_group(m: &HostMatrix, format: PackedFormat, group: usize, out: &mut [u8]) {
    let n = m.row_bytes();
    let rows: [&[u8]; GROUP_ROWS] = std::array::from_fn(|r| {
        let row = (group * GROUP_ROWS + r).min(m.rows() - 1);
        &m.data()[row * n..][..n]
    });
    match format {
        PackedFormat::Bf16 => pack_bf16(&rows, out),
        PackedFormat::E4m3 => pack_e4m3(&rows, m, group, out),
        PackedFormat::Int4 => pack_int4(&rows, m, group, out),
        _ => parts::pack(format, &rows, out),
    }
}

/// Pairs of columns.
fn pack_bf16(rows: &[&[u8]; GROUP_ROWS], out: &mut [u8]) {
    for (at, out) in (0..rows[0].len()).step_by(64).zip(out.chunks_mut(64 * GROUP_ROWS)) {
        pack_words(rows, at, (rows[0].len() - at).min(64), out, 0);
    }
}

/// `len` bytes of each row from `at` on, four at a time, with the bits of `flip` changed; what is missing of the last
/// four is zero.
#[inline(always)]
#[allow(clippy::inline_always, reason = "sizes are constants where it is used")]
fn pack_words(rows: &[&[u8]; GROUP_ROWS], at: usize, len: usize, out: &mut [u8], flip: u8) {
    let (lines, _) = out.as_chunks_mut::<64>();
    // The last words of a row may be fewer than a square, or not whole.
    let whole = len / 16;
    for (i, lines) in lines.as_chunks_mut::<4>().0.iter_mut().enumerate().take(whole) {
        turn_squares(rows, at + i * 16, lines, |square| turn_words(square, flip));
    }
    let (at, len) = (at + whole * 16, len - whole * 16);
    let lines = &mut lines[whole * 4..];
    if len == 0 {
        return;
    }
    if len.is_multiple_of(4) && rows[0].len() >= at + 16 {
        let mut square = [[0; 64]; 4];
        turn_squares(rows, at, &mut square, |square| turn_words(square, flip));
        lines[..len / 4].copy_from_slice(&square[..len / 4]);
        return;
    }
    for (r, row) in rows.iter().enumerate() {
        for (line, bytes) in lines.iter_mut().zip(row[at..at + len].chunks(4)) {
            let word = &mut line[r * 4..r * 4 + 4];
            word.fill(0);
            word.iter_mut().zip(bytes).for_each(|(out, byte)| *out = byte ^ flip);
        }
    }
}

/// Sixteen bytes of each row, from byte `at` on: four rows at a time. The rows of the next group begin where these end:
/// what is packed next of it is asked for meanwhile, else packing would wait for memory.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the innermost loop of packing")]
fn turn_squares(
    rows: &[&[u8]; GROUP_ROWS],
    at: usize,
    lines: &mut [[u8; 64]; 4],
    turn: impl Fn(Square<'_>) -> [[u8; 16]; 4],
) {
    prefetch(rows[0].as_ptr().wrapping_add((rows[0].len() + at) * GROUP_ROWS), 16 * GROUP_ROWS);
    for (four, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        let square = rows.map(|row| &row[at..at + 16].as_chunks().0[0]);
        for (line, turned) in lines.iter_mut().zip(turn(square)) {
            line[four * 16..][..16].copy_from_slice(&turned);
        }
    }
}

/// The scales of the group's blocks, then its codes: of four codes of a row the first two lie in the first half of 16
/// bytes and the last two in the second half, four rows to each 16 bytes. Widening a half gives pairs in row order.
fn pack_e4m3(rows: &[&[u8]; GROUP_ROWS], m: &HostMatrix, group: usize, out: &mut [u8]) {
    let (header, codes) = out.split_at_mut(PackedFormat::E4m3.header_bytes(m.cols()));
    let grid = m.cols().div_ceil(RUN);
    let scales = m.scales().unwrap_or_default();
    let of_group = &scales[group * GROUP_ROWS / RUN * grid..][..grid];
    for (out, scale) in header.chunks_exact_mut(4).zip(of_group) {
        out.copy_from_slice(&scale.to_le_bytes());
    }
    // What lies past the last column must be a number.
    codes[(grid - 1) * E4M3_BLOCK_BYTES..].fill(0);
    let (lines, _) = codes.as_chunks_mut::<64>();
    let whole = m.cols() / 16;
    for (i, lines) in lines.as_chunks_mut::<4>().0.iter_mut().enumerate().take(whole) {
        turn_squares(rows, i * 16, lines, turn_pairs);
    }
    for (r, row) in rows.iter().enumerate() {
        let at = r / 4 * 16 + r % 4 * 2;
        for (line, four) in lines.iter_mut().skip(whole * 4).zip(row[whole * 16..].chunks(4)) {
            for (i, code) in four.iter().enumerate() {
                line[at + i / 2 * 8 + i % 2] = *code;
            }
        }
    }
}

/// Per block the scales of the rows, then the nibbles in the order of Q4_0: byte `i` has columns `i` and `i + 16`.
fn pack_int4(rows: &[&[u8]; GROUP_ROWS], m: &HostMatrix, group: usize, out: &mut [u8]) {
    let grid = m.cols() / 32 * 2;
    let scales = m.group_scales().unwrap_or_default();
    for (b, out) in out.chunks_exact_mut(18 * GROUP_ROWS).enumerate() {
        for (r, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate().take(GROUP_ROWS) {
            let row = (group * GROUP_ROWS + r).min(m.rows() - 1);
            out.copy_from_slice(&scales[row * grid + b * 2..][..2]);
        }
        let nibbles = rows.map(|row| halves_together(&row[b * 16..]));
        let nibbles = nibbles.each_ref().map(<[u8; 16]>::as_slice);
        pack_words(&nibbles, 0, 16, &mut out[2 * GROUP_ROWS..], 0);
    }
}

/// 32 codes in the order of the columns, as the nibbles of Q4_0.
#[inline]
fn halves_together(codes: &[u8]) -> [u8; 16] {
    std::array::from_fn(|i| {
        let code = |column: usize| codes[column / 2] >> (column % 2 * 4) & 15;
        code(i) | code(i + 16) << 4
    })
}

/// The low and the high bytes of the BF16 values of the E4M3 codes without sign: every one is exact.
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) static E4M3_TO_BF16: ([u8; 128], [u8; 128]) = {
    let (mut low, mut high) = ([0; 128], [0; 128]);
    let mut code = 0;
    while code < 128 {
        let bits = oxseek_tensor::dtype::e4m3_to_f32(code as u8).to_bits() >> 16;
        (low[code], high[code]) = (bits as u8, (bits >> 8) as u8);
        code += 1;
    }
    (low, high)
};

#[cfg(test)]
mod tests {
    use oxseek_tensor::{
        conformance::Random,
        dtype::{self, bf16_to_f32},
    };

    use super::*;

    #[test]
    fn every_e4m3_code_is_exact_in_bf16() {
        for code in 0..127u8 {
            let bits = u16::from_le_bytes([E4M3_TO_BF16.0[code as usize], E4M3_TO_BF16.1[code as usize]]);
            assert_eq!(bf16_to_f32(bits).to_bits(), dtype::e4m3_to_f32(code).to_bits());
        }
        assert!(bf16_to_f32(u16::from_le_bytes([E4M3_TO_BF16.0[127], E4M3_TO_BF16.1[127]])).is_nan());
    }

    #[test]
    fn a_group_has_each_row_in_its_lane() {
        let m = Random::new(1).matrix(DType::BF16, 19, 5).unwrap();
        let layout = PanelRef::layout(PackedFormat::Bf16, 19, 5);
        let mut out = vec![0xaa; layout.group_bytes];
        pack_group(&m, PackedFormat::Bf16, 1, &mut out);
        for r in 0..GROUP_ROWS {
            let row = &m.data()[(16 + r).min(18) * 10..][..10];
            let found: Vec<u8> = (0..3).flat_map(|u| out[u * 64 + r * 4..][..4].to_vec()).collect();
            assert_eq!((&found[..10], &found[10..]), (row, [0, 0].as_slice()), "row {r}");
        }
    }
}

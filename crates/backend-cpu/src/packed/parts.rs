//! How the blocks of each format lie in a packed group: the parts of a block in turn, each for all sixteen rows.

use super::{GROUP_ROWS, PackedFormat, pack_words};

/// A part of a block, by the byte that it begins at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A half of each row: 32 bytes.
    Half(usize),
    /// The same with the other sign: minima are subtracted.
    Negated(usize),
    /// A byte of each row: 16 bytes.
    Byte(usize),
    /// So many bytes of each row, four at a time: units and words of 64 bytes.
    Words(usize, usize),
    /// The same, signed bytes plus 128.
    Unsigned(usize, usize),
    /// A word of 32 bits, one per column, as a unit: bit `u` of byte `k` is that of column `4 * u + k`.
    ColumnBits(usize),
}

use Part::{Byte, ColumnBits, Half, Negated, Unsigned, Words};

/// The blocks of a format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    cols: usize,
    bytes: usize,
    parts: &'static [Part],
}

impl PackedFormat {
    /// `None` for formats without blocks, or whose scales lie apart.
    pub(super) const fn blocks(self) -> Option<Blocks> {
        let (cols, bytes, parts): (_, _, &[Part]) = match self {
            Self::Bf16 | Self::E4m3 | Self::Int4 => return None,
            Self::Q8_0 => (32, 34, &[Half(0), Unsigned(2, 32)]),
            Self::Q4_0 | Self::Iq4Nl => (32, 18, &[Half(0), Words(2, 16)]),
            Self::Q4_1 => (32, 20, &[Half(0), Negated(2), Words(4, 16)]),
            Self::Q5_0 => (32, 22, &[Half(0), ColumnBits(2), Words(6, 16)]),
            Self::Q5_1 => (32, 24, &[Half(0), Negated(2), ColumnBits(4), Words(8, 16)]),
            Self::Q2K => (256, 84, &[Half(80), Half(82), Words(0, 16), Words(16, 64)]),
            Self::Q3K => (256, 110, &[Half(108), Words(96, 12), Words(0, 32), Words(32, 64)]),
            Self::Q4K => (256, 144, &[Half(0), Half(2), Words(4, 12), Words(16, 128)]),
            Self::Q5K => (256, 176, &[Half(0), Half(2), Words(4, 12), Words(16, 32), Words(48, 128)]),
            Self::Q6K => (256, 210, &[Half(208), Unsigned(192, 16), Words(0, 128), Words(128, 64)]),
            Self::Iq4Xs => (256, 136, &[Half(0), Half(2), Words(4, 4), Words(8, 128)]),
            Self::Mxfp4 => (32, 17, &[Byte(0), Words(1, 16)]),
        };
        Some(Blocks { cols, bytes, parts })
    }
}

/// Packs sixteen rows of blocks: a loop of its own for each format, whose parts are constants in it.
pub(super) fn pack(format: PackedFormat, rows: &[&[u8]; GROUP_ROWS], out: &mut [u8]) {
    macro_rules! formats {
        ($($format:ident)*) => {
            match format {
                $(PackedFormat::$format => {
                    const BLOCKS: Option<Blocks> = PackedFormat::$format.blocks();
                    if let Some(blocks) = BLOCKS {
                        blocks.pack(rows, out);
                    }
                })*
            }
        };
    }
    formats!(Bf16 E4m3 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2K Q3K Q4K Q5K Q6K Iq4Nl Iq4Xs Mxfp4 Int4);
}

impl Part {
    /// Bytes of each row.
    const fn row_bytes(self) -> usize {
        match self {
            Half(_) | Negated(_) => 2,
            Byte(_) => 1,
            Words(_, len) | Unsigned(_, len) => len,
            ColumnBits(_) => 4,
        }
    }

    /// Packs the part of the block that begins at byte `block` of each row.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a constant where it is used")]
    fn pack(self, rows: &[&[u8]; GROUP_ROWS], block: usize, out: &mut [u8]) {
        match self {
            Half(at) => pack_each(rows, block + at, out, |half: [u8; 2]| half),
            Negated(at) => pack_each(rows, block + at, out, |[low, high]| [low, high ^ 0x80]),
            Byte(at) => pack_each(rows, block + at, out, |byte: [u8; 1]| byte),
            Words(at, len) => pack_words(rows, block + at, len, out, 0),
            Unsigned(at, len) => pack_words(rows, block + at, len, out, 0x80),
            ColumnBits(at) => {
                pack_each(rows, block + at, out, |word| column_bits(u32::from_le_bytes(word)).to_le_bytes());
            }
        }
    }
}

impl Blocks {
    pub(super) const fn group_bytes(&self, cols: usize) -> usize {
        cols / self.cols * self.bytes * GROUP_ROWS
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a constant where it is used")]
    fn pack(&self, rows: &[&[u8]; GROUP_ROWS], out: &mut [u8]) {
        for (b, mut out) in out.chunks_exact_mut(self.bytes * GROUP_ROWS).enumerate() {
            // One by one and not in a loop: so each is a constant.
            out = self.pack_part(0, rows, b * self.bytes, out);
            out = self.pack_part(1, rows, b * self.bytes, out);
            out = self.pack_part(2, rows, b * self.bytes, out);
            out = self.pack_part(3, rows, b * self.bytes, out);
            out = self.pack_part(4, rows, b * self.bytes, out);
            debug_assert!(out.is_empty(), "at most five parts");
        }
    }

    /// Packs one part of the block that begins at byte `block` of each row, if there is such a part; gives what is left
    /// of its place.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a constant where it is used")]
    fn pack_part<'a>(
        &self,
        part: usize,
        rows: &[&[u8]; GROUP_ROWS],
        block: usize,
        out: &'a mut [u8],
    ) -> &'a mut [u8] {
        let Some(part) = self.parts.get(part) else { return out };
        let (place, rest) = out.split_at_mut(part.row_bytes() * GROUP_ROWS);
        part.pack(rows, block, place);
        rest
    }
}

/// `N` bytes of each row.
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
fn pack_each<const N: usize>(
    rows: &[&[u8]; GROUP_ROWS],
    at: usize,
    out: &mut [u8],
    change: impl Fn([u8; N]) -> [u8; N],
) {
    for (row, out) in rows.iter().zip(out.as_chunks_mut().0) {
        if let Some(bytes) = row[at..].first_chunk() {
            *out = change(*bytes);
        }
    }
}

/// Bit `4 * u + k` becomes bit `8 * k + u`.
fn column_bits(word: u32) -> u32 {
    (0..4).fold(0, |bits, k| {
        // Every fourth bit, then two, four and eight of them together.
        let one = word >> k & 0x1111_1111;
        let two = (one | one >> 3) & 0x0303_0303;
        let four = (two | two >> 6) & 0x000f_000f;
        bits | ((four | four >> 12) & 0xff) << (8 * k)
    })
}

#[cfg(test)]
mod tests {
    use oxseek_tensor::DType;

    use super::*;

    /// The same bits in another order: each byte of a block is in one part.
    #[test]
    fn parts_cover_a_block_once() {
        for dtype in DType::ALL {
            let Some(blocks) = PackedFormat::of(dtype).and_then(PackedFormat::blocks) else { continue };
            assert_eq!((blocks.cols, blocks.bytes), (dtype.block_len(), dtype.block_bytes()), "{dtype}");
            let mut covered = vec![0; blocks.bytes];
            for part in blocks.parts {
                let (Half(at) | Negated(at) | Byte(at) | ColumnBits(at) | Words(at, _) | Unsigned(at, _)) =
                    *part;
                covered[at..at + part.row_bytes()].iter_mut().for_each(|n| *n += 1);
            }
            assert!(covered.iter().all(|n| *n == 1), "{dtype}: {covered:?}");
        }
    }

    #[test]
    fn each_column_has_its_bit_in_its_byte() {
        assert_eq!(column_bits(1), 1);
        assert_eq!(column_bits(1 << 1), 1 << 8);
        assert_eq!(column_bits(1 << 4), 1 << 1);
        assert_eq!(column_bits(1 << 31), 1 << 31);
        assert_eq!(column_bits(u32::MAX), u32::MAX);
        for i in 0..32 {
            assert_eq!(column_bits(1 << i), 1 << (i % 4 * 8 + i / 4));
        }
    }
}

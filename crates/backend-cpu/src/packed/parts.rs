//! How the blocks of each format lie in a packed group: the parts of a block in turn, each for all sixteen rows.

use super::{GROUP_ROWS, PackedFormat, bring_next, pack_words};

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
    pub(super) fn blocks(self) -> Option<Blocks> {
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
    pub(super) fn group_bytes(&self, cols: usize) -> usize {
        cols / self.cols * self.bytes * GROUP_ROWS
    }

    pub(super) fn pack(&self, rows: &[&[u8]; GROUP_ROWS], out: &mut [u8]) {
        for (b, mut out) in out.chunks_exact_mut(self.bytes * GROUP_ROWS).enumerate() {
            bring_next(rows, b * self.bytes * GROUP_ROWS, self.bytes * GROUP_ROWS);
            for part in self.parts {
                let (place, rest) = out.split_at_mut(part.row_bytes() * GROUP_ROWS);
                part.pack(rows, b * self.bytes, place);
                out = rest;
            }
        }
    }
}

/// `N` bytes of each row.
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
    (0..32).fold(0, |bits, i| bits | (word >> i & 1) << (i % 4 * 8 + i / 4))
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
    }
}

//! Large files that this program writes.

use std::{
    fs::File,
    io::{Result, Write},
};

/// Bytes that are written at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Writes in pieces of 4 MiB that lie at multiples of 4 MiB: the system's file cache then holds the file in pages of
/// 2 MiB, and a model that was just written is mapped in no time.
pub struct Pieces<W: Write = File> {
    out: W,
    piece: Vec<u8>,
}

impl<W: Write> Pieces<W> {
    /// What is written to it begins `out`, and is there only after a flush.
    pub fn new(out: W) -> Self {
        Self { out, piece: Vec::with_capacity(PIECE_BYTES) }
    }

    fn write_piece(&mut self) -> Result<()> {
        self.out.write_all(&self.piece)?;
        self.piece.clear();
        Ok(())
    }
}

impl<W: Write> Write for Pieces<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if self.piece.len() == PIECE_BYTES {
            self.write_piece()?;
        }
        let n = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> Result<()> {
        self.write_piece()?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what it is given and the sizes of the writes.
    #[derive(Default)]
    struct Sink(Vec<u8>, Vec<usize>);

    impl Write for &mut Sink {
        fn write(&mut self, bytes: &[u8]) -> Result<usize> {
            self.0.extend_from_slice(bytes);
            self.1.push(bytes.len());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn pieces_are_whole_but_for_the_last() {
        let bytes: Vec<u8> = (0..2 * PIECE_BYTES + 5).map(|i| (i % 251) as u8).collect();
        let mut sink = Sink::default();
        let mut pieces = Pieces::new(&mut sink);
        for part in bytes.chunks(1_000_003) {
            pieces.write_all(part).unwrap();
        }
        pieces.flush().unwrap();
        drop(pieces);
        assert_eq!(sink.1, [PIECE_BYTES, PIECE_BYTES, 5]);
        assert_eq!(sink.0, bytes);
    }
}

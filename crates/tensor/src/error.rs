//! What can go wrong at the backend door.

use thiserror::Error;

/// An error of a backend or of a matrix made for it.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum Error {
    /// A matrix whose bytes do not fit its shape and format.
    #[error("matrix {rows}x{cols} in {dtype}: expected {expected} bytes, found {found}")]
    MatrixBytes {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Name of the storage format.
        dtype: &'static str,
        /// Bytes that the shape asks for.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// A row that is no whole number of blocks.
    #[error("matrix {rows}x{cols} in {dtype}: its columns are no whole number of blocks of {block}")]
    Blocks {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Name of the storage format.
        dtype: &'static str,
        /// Elements of a block.
        block: usize,
    },
    /// A row that cannot be written alone.
    #[error("{dtype}: a row cannot be encoded alone, its scales lie beside the matrix")]
    ScalesApart {
        /// Name of the storage format.
        dtype: &'static str,
    },
    /// Block scales whose grid does not fit the matrix.
    #[error("matrix {rows}x{cols}: expected {expected} block scales, found {found}")]
    ScaleGrid {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Scales that the shape asks for.
        expected: usize,
        /// Scales that were given.
        found: usize,
    },
    /// Sizes that overflow the address space.
    #[error("{what}: size overflows")]
    Overflow {
        /// What was being sized.
        what: &'static str,
    },
    /// Shapes that do not fit together.
    #[error("{op}: {what}: expected {expected}, found {found}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// Which operand.
        what: &'static str,
        /// The size that was needed.
        expected: usize,
        /// The size that was given.
        found: usize,
    },
    /// A format that this backend has no kernel for.
    #[error("{op}: the {backend} backend has no kernel for {dtype}")]
    Unsupported {
        /// The op that refused.
        op: &'static str,
        /// Name of the backend.
        backend: &'static str,
        /// Name of the storage format.
        dtype: &'static str,
    },
    /// The device is out of memory.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was being allocated.
        what: &'static str,
        /// How many bytes were asked for.
        bytes: usize,
    },
    /// The device or its driver failed.
    #[error("device: {0}")]
    Device(String),
}

/// [`Error::Shape`] in one line.
pub fn shape_error(op: &'static str, what: &'static str, expected: usize, found: usize) -> Error {
    Error::Shape { op, what, expected, found }
}

/// `found` must be `expected`.
///
/// # Errors
/// [`Error::Shape`]
pub fn expect(op: &'static str, what: &'static str, expected: usize, found: usize) -> Result<(), Error> {
    if expected == found { Ok(()) } else { Err(shape_error(op, what, expected, found)) }
}

/// `found` must not be over `max`.
///
/// # Errors
/// [`Error::Shape`]
pub fn at_most(op: &'static str, what: &'static str, max: usize, found: usize) -> Result<(), Error> {
    if found <= max { Ok(()) } else { Err(shape_error(op, what, max, found)) }
}

//! Memory-mapped files: this crate's only `unsafe`.
#![allow(unsafe_code, reason = "mapping a file is unsafe by nature; it is confined to this file")]

use std::{fs::File, path::Path, sync::Arc};

use memmap2::Mmap;
use oxseek_tensor::ByteRegion;

use crate::Error;

/// Maps a whole regular file for reading.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened or mapped, [`Error::File`] when it is empty or not a regular file.
pub fn map(path: &Path) -> Result<ByteRegion, Error> {
    let io = |source| Error::Io { path: path.into(), source };
    // A FIFO would block on open, so what it is must be known before.
    let meta = std::fs::metadata(path).map_err(io)?;
    if !meta.is_file() {
        return Err(Error::File { file: path.display().to_string(), why: "not a regular file".into() });
    }
    let file = File::open(path).map_err(io)?;
    if meta.len() == 0 {
        return Err(Error::File { file: path.display().to_string(), why: "the file is empty".into() });
    }
    // SAFETY: the mapping is read-only and private to us. The one thing that can go wrong is another process that
    // truncates or rewrites the file while it is mapped: that ends us with SIGBUS or feeds us changed weights, never
    // corrupts our own memory, and SECURITY.md says so. The bytes are only ever read as plain integers.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(ByteRegion::whole(Arc::new(map)))
}

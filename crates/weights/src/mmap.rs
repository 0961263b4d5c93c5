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
    // Where the file system can, the file is then read in pages of 2 MiB and mapped so: mapping a gigabyte that is in
    // the file cache takes a millisecond instead of a hundred. A kernel that cannot refuses, and nothing changes.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let map = Arc::new(map);
    let region = ByteRegion::whole(Arc::clone(&map) as Arc<dyn AsRef<[u8]> + Send + Sync>);
    Ok(region.with_release(Arc::new(move |range| release(&map, range))))
}

/// Takes the whole pages inside of a range out of this process; the system's file cache keeps them while it has room.
#[cfg(unix)]
fn release(map: &Mmap, range: std::ops::Range<usize>) {
    /// Larger than any page: edges that other tensors share stay.
    const EDGE: usize = 64 << 10;
    let (from, to) = (range.start.next_multiple_of(EDGE), range.end / EDGE * EDGE);
    if from < to {
        // SAFETY: the mapping is of a file, shared and never written: pages that are dropped are read from the file
        // again with the same bytes. A refusal changes nothing.
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
    }
}

#[cfg(not(unix))]
fn release(_map: &Mmap, _range: std::ops::Range<usize>) {}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn released_bytes_come_back_the_same() {
        let path = std::env::temp_dir().join(format!("oxseek-mmap-{}", std::process::id()));
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let region = map(&path).unwrap();
        for range in [0..300_000, 100..200, 65_000..200_001] {
            region.slice(range).unwrap().release();
            assert_eq!(region.bytes(), bytes);
        }
        std::fs::remove_file(&path).unwrap();
    }
}

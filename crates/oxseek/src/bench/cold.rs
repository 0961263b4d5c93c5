//! The start of a model that only the disk has.

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oxseek_weights::Checkpoint;

use crate::failure::Failure;

/// Bytes that a thread reads at a time.
const PIECE_BYTES: usize = 4 << 20;

/// What the disk can do, measured before the start.
pub struct Cold {
    /// Bytes of the model's files.
    pub bytes: u64,
    /// How long plain reading of all of them takes.
    pub plain: Duration,
}

impl Cold {
    /// Reads all files of the model at `path` from disk, as many pieces at a time as there are threads; afterwards none
    /// of them is in the system's file cache.
    pub fn prepare(path: &Path, threads: usize) -> Result<Self, Failure> {
        let files: Vec<File> = files_of(path)?.iter().map(File::open).collect::<Result<_, _>>()?;
        forget(&files)?;
        let since = Instant::now();
        let mut bytes = 0;
        for file in &files {
            let len = file.metadata()?.len();
            read(file, len, threads)?;
            bytes += len;
        }
        let plain = since.elapsed();
        forget(&files)?;
        Ok(Self { bytes, plain })
    }
}

/// The files that hold the weights.
fn files_of(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let checkpoint = Checkpoint::open(path).map_err(|e| Failure::Model(e.to_string()))?;
    let names: BTreeSet<&str> = checkpoint.tensors().map(|t| t.file).collect();
    Ok(names.into_iter().map(|n| if path.is_dir() { path.join(n) } else { path.with_file_name(n) }).collect())
}

/// Takes files out of the system's cache. Pages that another process has mapped stay.
#[cfg(target_os = "linux")]
fn forget(files: &[File]) -> Result<(), Failure> {
    for file in files {
        // Only what is on disk already can go.
        file.sync_all()?;
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).map_err(std::io::Error::from)?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn read(file: &File, len: u64, threads: usize) -> Result<(), Failure> {
    use std::{os::unix::fs::FileExt, thread};
    let one = |first: usize| -> std::io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        for at in (0..len).step_by(PIECE_BYTES).skip(first).step_by(threads) {
            let n = (len - at).min(PIECE_BYTES as u64) as usize;
            file.read_exact_at(&mut piece[..n], at)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|first| scope.spawn(move || one(first))).collect();
        let died = || std::io::Error::other("a reader died");
        readers.into_iter().try_for_each(|r| r.join().unwrap_or_else(|_| Err(died())))
    })?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &[File]) -> Result<(), Failure> {
    Err(Failure::Usage(
        "--cold needs Linux: other systems do not let files be taken out of their cache".into(),
    ))
}

#[cfg(not(target_os = "linux"))]
fn read(_: &File, _: u64, _: usize) -> Result<(), Failure> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_read_whole_whatever_the_threads() {
        let path = std::env::temp_dir().join(format!("oxseek-cold-{}", std::process::id()));
        std::fs::write(&path, vec![1; 2 * PIECE_BYTES + 7]).unwrap();
        let file = File::open(&path).unwrap();
        for threads in [1, 2, 5] {
            assert!(read(&file, 2 * PIECE_BYTES as u64 + 7, threads).is_ok());
            assert!(read(&file, 2 * PIECE_BYTES as u64 + 8, threads).is_err(), "the file ends before");
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_path_without_a_model_is_an_error() {
        assert!(matches!(Cold::prepare(Path::new("/nonexistent.gguf"), 1), Err(Failure::Model(_))));
    }
}

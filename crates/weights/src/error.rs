//! What can be wrong with a checkpoint.

use std::{fmt::Write as _, path::PathBuf};

use thiserror::Error;

/// What is wrong with a checkpoint. Each names the file, and the tensor or field where there is one.
#[derive(Debug, Error)]
pub enum Error {
    /// The system would not let us read a file.
    #[error("{}: {source}", plain(&path.display().to_string()))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder that is no checkpoint we can read.
    #[error("{}: {}", plain(&path.display().to_string()), plain(why))]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is missing or unsupported, and what to do.
        why: String,
    },
    /// A file whose header does not hold.
    #[error("{}: {}", plain(file), plain(why))]
    File {
        /// The file.
        file: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A tensor that is missing or not what was expected.
    #[error("{}: tensor {}: {}", plain(file), plain(tensor), plain(why))]
    Tensor {
        /// The file it is in, or should be in.
        file: String,
        /// The tensor.
        tensor: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A metadata entry of a GGUF file that is missing, out of range or unsupported.
    #[error("{}: key {}: {}", plain(file), plain(key), plain(why))]
    Key {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A configuration field that is missing, out of range or unsupported.
    #[error("{file}: {}: {}", plain(field), plain(why))]
    Config {
        /// The file.
        file: &'static str,
        /// The field.
        field: String,
        /// What was expected and what was found.
        why: String,
    },
}

/// Most characters of a part of a message that a file can choose.
const PART_CHARS_MAX: usize = 800;

/// `text` fit for a terminal and a log: names come from the file, so they may hold escape sequences, line breaks and
/// marks that reorder text, or be a hundred megabytes long.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let skipped = text.chars().count().saturating_sub(PART_CHARS_MAX);
    for (i, c) in text.chars().enumerate() {
        let from_middle = i.checked_sub(PART_CHARS_MAX / 2);
        match from_middle {
            // What was expected stands at the end of a message, so it is the middle that goes.
            Some(0) if skipped > 0 => {
                let _ = write!(out, " [{skipped} characters] ");
            }
            Some(at) if at < skipped => {}
            _ if hides(c) => out.extend(c.escape_unicode()),
            _ => out.push(c),
        }
    }
    out
}

/// Control characters, zero-width characters, line separators and bidirectional marks.
fn hides(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

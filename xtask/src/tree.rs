//! The tracked files.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::rust_source::RustSource;

/// A tracked file that is there.
pub struct File {
    /// From the root of the repository, with `/`.
    pub path: String,
    pub bytes: u64,
    /// None for what is not UTF-8 text.
    pub text: Option<String>,
}

impl File {
    pub fn is_rust(&self) -> bool {
        self.has_extension("rs")
    }

    pub fn has_extension(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|e| e == extension)
    }

    /// Its lines with their numbers; none for what is not text.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.iter().flat_map(|t| t.lines()).enumerate().map(|(i, line)| (i + 1, line))
    }

    /// Code, comments and strings apart; None for what is not Rust.
    pub fn rust(&self) -> Option<RustSource> {
        self.text.as_deref().filter(|_| self.is_rust()).map(RustSource::new)
    }
}

/// All tracked files, by path.
pub struct Tree {
    pub files: Vec<File>,
}

impl Tree {
    /// The files that `git ls-files` lists.
    pub fn of_repository() -> Result<Self, String> {
        let root = root();
        let git = Command::new("git").args(["ls-files", "-z"]).current_dir(&root).output();
        let output =
            git.map_err(|e| format!("cannot run git: {e}; tidy needs git to know which files are tracked"))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("git ls-files failed: {}; run tidy inside of a clone", why.trim()));
        }
        let listed =
            String::from_utf8(output.stdout).map_err(|_| "a tracked path is not UTF-8; rename that file")?;
        let mut files = Vec::new();
        for path in listed.split('\0').filter(|p| !p.is_empty()) {
            let full = root.join(path);
            // A deletion that is not committed yet, or a link.
            if !fs::symlink_metadata(&full).is_ok_and(|m| m.is_file()) {
                continue;
            }
            let bytes = fs::read(&full).map_err(|e| format!("{path}: {e}"))?;
            files.push(File {
                path: path.into(),
                bytes: bytes.len() as u64,
                text: String::from_utf8(bytes).ok(),
            });
        }
        if files.is_empty() {
            return Err("git tracks no file here; run tidy inside of a clone".into());
        }
        Ok(Self { files })
    }

    pub fn get(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|f| f.path == path)
    }

    /// Files below `folder` (which ends with `/`), with the rest of their path.
    pub fn below<'a>(&'a self, folder: &'a str) -> impl Iterator<Item = (&'a File, &'a str)> {
        self.files.iter().filter_map(move |f| f.path.strip_prefix(folder).map(|rest| (f, rest)))
    }

    /// Folders of the workspace's crates: `crates/tensor`, ..., `xtask`.
    pub fn crates(&self) -> Vec<&str> {
        let manifests = self.files.iter().filter_map(|f| f.path.strip_suffix("/Cargo.toml"));
        manifests.filter(|folder| folder.starts_with("crates/") || *folder == "xtask").collect()
    }
}

/// The root of the repository: the folder above this crate.
pub fn root() -> PathBuf {
    let own = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    own.and_then(|p| p.parent().map(Path::to_path_buf)).unwrap_or_else(|| PathBuf::from("."))
}

#[cfg(test)]
pub fn tree(files: &[(&str, &str)]) -> Tree {
    let file = |&(path, text): &(&str, &str)| File {
        path: path.into(),
        bytes: text.len() as u64,
        text: Some(text.into()),
    };
    Tree { files: files.iter().map(file).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_repository_is_read() {
        let tree = Tree::of_repository().unwrap();
        assert!(tree.get("xtask/src/main.rs").is_some_and(File::is_rust));
        assert!(tree.crates().contains(&"crates/tensor"));
        assert!(tree.below("xtask/src/").any(|(_, rest)| rest == "tree.rs"));
    }
}

//! How large the repository and its tree of dependencies may grow.

use super::Violation;
use crate::tree::Tree;

const MIB: u64 = 1 << 20;
/// All tracked files; a clone must stay quick.
const TOTAL_BYTES_MAX: u64 = 45 * MIB;
/// One file that is neither a model nor a golden.
const FILE_BYTES_MAX: u64 = MIB;
/// Kernels for five generations of GPUs.
const FATBIN: (&str, u64) = ("crates/backend-cuda/kernels/kernels.fatbin", MIB * 3 / 2);
const LARGE_FOLDERS: [&str; 2] = ["goldens/", "models/"];
const LOCK: &str = "Cargo.lock";
const PACKAGES_MAX: usize = 240;

/// The tracked files are small together and, models apart, each.
pub fn size(tree: &Tree) -> Vec<Violation> {
    const RULE: &str = "size";
    let mut found = Vec::new();
    let total = total(tree);
    if total >= TOTAL_BYTES_MAX {
        let message = format!(
            "{total} bytes are tracked, below {TOTAL_BYTES_MAX} allowed; make goldens smaller or fetch them"
        );
        found.push(Violation::new(".", 1, RULE, message));
    }
    for file in tree.files.iter().filter(|f| f.path != LOCK) {
        let most = if file.path == FATBIN.0 { FATBIN.1 } else { FILE_BYTES_MAX };
        if file.bytes > most && !LARGE_FOLDERS.iter().any(|folder| file.path.starts_with(folder)) {
            let message =
                format!("{} bytes, at most {most} allowed; split it or do not track it", file.bytes);
            found.push(Violation::new(&file.path, 1, RULE, message));
        }
    }
    found
}

/// `Cargo.lock` lists few packages.
pub fn packages(tree: &Tree) -> Vec<Violation> {
    let n = package_count(tree);
    let message = format!("{n} packages, at most {PACKAGES_MAX} allowed; do without the newest dependency");
    if n > PACKAGES_MAX { vec![Violation::new(LOCK, 1, "packages", message)] } else { Vec::new() }
}

/// The figures, for people.
pub fn summary(tree: &Tree) -> String {
    format!(
        "{} files, {:.1} of {} MiB, {} of {PACKAGES_MAX} packages",
        tree.files.len(),
        total(tree) as f64 / MIB as f64,
        TOTAL_BYTES_MAX / MIB,
        package_count(tree)
    )
}

fn total(tree: &Tree) -> u64 {
    tree.files.iter().map(|f| f.bytes).sum()
}

fn package_count(tree: &Tree) -> usize {
    tree.get(LOCK).map_or(0, |f| f.lines().filter(|(_, l)| *l == "[[package]]").count())
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn large_files_are_found() {
        let large = " ".repeat(FILE_BYTES_MAX as usize + 1);
        let files = [
            ("web/app.js", large.as_str()),
            ("models/m.safetensors", &large),
            (LOCK, &large),
            (FATBIN.0, &large),
        ];
        assert_eq!(places(size, &files), ["web/app.js:1"]);
        let mut tree = crate::tree::tree(&[("models/m.safetensors", "")]);
        tree.files[0].bytes = TOTAL_BYTES_MAX;
        assert_eq!(size(&tree).len(), 1);
    }

    #[test]
    fn many_packages_are_found() {
        let lock = |n: usize| "[[package]]\n".repeat(n);
        assert!(places(packages, &[(LOCK, &lock(PACKAGES_MAX))]).is_empty());
        assert_eq!(places(packages, &[(LOCK, &lock(PACKAGES_MAX + 1))]), ["Cargo.lock:1"]);
    }
}

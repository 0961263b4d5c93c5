//! How much memory there is: what the system has left, and what control groups allow.

use std::{fs, path::Path};

/// Limits at and above this many bytes are none.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Memory of this machine, as far as this process may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of the machine.
    pub total: u64,
    /// Bytes that can be had without swapping: pages of files count as free, and the tightest control group decides.
    pub available: u64,
    /// The limit of that group, if it is a group that decides.
    pub group_limit: Option<u64>,
}

impl Memory {
    /// Reads it off a running system; `root` is `/` but in tests. `None` where the system does not tell.
    pub fn read(root: &Path) -> Option<Self> {
        let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
        let total = kibibytes(&info, "MemTotal:")?;
        let system = kibibytes(&info, "MemAvailable:")?;
        let mut memory = Self { total, available: system, group_limit: None };
        for group in Group::all(root) {
            let left = group.limit.saturating_sub(group.used);
            if left < memory.available {
                memory = Self { available: left, group_limit: Some(group.limit), ..memory };
            }
        }
        Some(memory)
    }
}

/// A control group with a limit.
struct Group {
    limit: u64,
    /// Bytes in use that cannot be given back: pages of files can.
    used: u64,
}

/// The files of one version of control groups.
struct Names {
    folder: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`.
    files: [&'static str; 2],
}

const VERSION_1: Names = Names {
    folder: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    files: ["total_inactive_file ", "total_active_file "],
};
const VERSION_2: Names = Names {
    folder: "sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    files: ["inactive_file ", "active_file "],
};

impl Group {
    /// The groups of this process that have a limit, and those above them.
    fn all(root: &Path) -> Vec<Self> {
        let lines = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let mut found = Vec::new();
        for line in lines.lines() {
            // hierarchy:controllers:path
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let names = match controllers {
                "" => &VERSION_2,
                c if c.split(',').any(|c| c == "memory") => &VERSION_1,
                _ => continue,
            };
            let folder = root.join(names.folder);
            // Inside of a container the path may be that of the outside; then only the top is there.
            let path = Path::new(path.trim_start_matches('/'));
            found.extend(path.ancestors().filter_map(|p| Self::read(&folder.join(p), names)));
        }
        found
    }

    fn read(folder: &Path, names: &Names) -> Option<Self> {
        let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        let limit = number(names.limit).filter(|l| *l < UNLIMITED_BYTES)?;
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let files = names
            .files
            .iter()
            .filter_map(|name| stat.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok()));
        let files = files.fold(0, u64::saturating_add);
        Some(Self { limit, used: number(names.usage)?.saturating_sub(files) })
    }
}

/// The line `name 123 kB`, in bytes.
fn kibibytes(info: &str, name: &str) -> Option<u64> {
    let line = info.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\n";

    /// A tree of files in a folder of its own, removed at the end.
    struct Tree(std::path::PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("oxseek-memory-{}-{name}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn read(name: &str, files: &[(&str, &str)]) -> Option<Memory> {
        Memory::read(&Tree::new(name, files).0)
    }

    #[test]
    fn without_groups_the_system_decides() {
        let memory = read("plain", &[("proc/meminfo", INFO), ("proc/self/cgroup", "0::/\n")]);
        let want = Memory { total: 2_048_000, available: 1_024_000, group_limit: None };
        assert_eq!(memory, Some(want));
    }

    #[test]
    fn the_tightest_group_decides_and_pages_of_files_are_free() {
        let files = [
            ("proc/meminfo", INFO),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "500000\n"),
            ("sys/fs/cgroup/a/memory.current", "300000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\nactive_file 20000\ninactive_file 80000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1\n"),
        ];
        let memory = read("two", &files).unwrap();
        assert_eq!((memory.available, memory.group_limit), (300_000, Some(500_000)));
    }

    #[test]
    fn groups_of_version_1_and_a_container_whose_path_is_not_there() {
        let files = [
            ("proc/meminfo", INFO),
            ("proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/123\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "400000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "150000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 50000\ntotal_active_file 0\n"),
        ];
        let memory = read("one", &files).unwrap();
        assert_eq!((memory.available, memory.group_limit), (300_000, Some(400_000)));
    }

    #[test]
    fn a_limit_beyond_the_machine_is_none() {
        let files = [
            ("proc/meminfo", INFO),
            ("proc/self/cgroup", "4:memory:/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "150000\n"),
        ];
        assert_eq!(read("none", &files).unwrap().group_limit, None);
    }

    #[test]
    fn what_cannot_be_read_is_unknown() {
        assert_eq!(read("empty", &[("proc/self/cgroup", "0::/\n")]), None);
        assert_eq!(read("garbage", &[("proc/meminfo", "MemTotal: many kB\nMemAvailable: -3 kB\n")]), None);
        let files = [
            ("proc/meminfo", INFO),
            ("proc/self/cgroup", "nonsense\n0::/../..\n0:\n\n"),
            ("sys/fs/cgroup/memory.max", "soon\n"),
        ];
        assert_eq!(read("odd", &files).unwrap().available, 1_024_000);
    }
}

//! `cargo xtask cuda`: builds the kernels of `backend-cuda` and notes what they were built from.

use std::{fs, path::Path, process::Command};

const FOLDER: &str = "crates/backend-cuda/kernels";
/// The file that includes the others, and machine code for whom: Ampere and Ada, Hopper, and PTX that the driver
/// compiles once for what comes later.
const MAIN: &str = "all.cu";
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"];

/// Runs nvcc (the one of the environment variable NVCC, else of PATH) and writes the fatbin, the hash of its sources
/// and what ptxas says of each kernel, which a test of `backend-cuda` reads.
pub fn build(root: &Path) -> Result<(), String> {
    let folder = root.join(FOLDER);
    let nvcc = std::env::var_os("NVCC").unwrap_or_else(|| "nvcc".into());
    let targets = TARGETS.map(|t| format!("-gencode={t}"));
    let output = Command::new(nvcc)
        .args([
            "-std=c++17",
            "-O3",
            "-fatbin",
            "-compress-mode=size",
            "-Xptxas=-v",
            "-o",
            "kernels.fatbin",
            MAIN,
        ])
        .args(&targets)
        .current_dir(&folder)
        .output();
    let output = output.map_err(|e| format!("cannot run nvcc: {e}; CUDA 13.0 has it, as a wheel too"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("nvcc failed\n{said}"));
    }
    fs::write(folder.join("resources.txt"), resources(&said)).map_err(|e| format!("resources.txt: {e}"))?;
    let hash = format!("{:016x}\n", hash(&sources(&folder)?));
    fs::write(folder.join("kernels.hash"), hash).map_err(|e| format!("kernels.hash: {e}"))
}

/// A line per kernel and target of what ptxas says: kernel, target, registers, bytes spilled (stores and loads, its own
/// functions included).
fn resources(said: &str) -> String {
    let (mut lines, mut kernel, mut spilled) = (Vec::new(), None, 0);
    let number = |words: &[&str], before: &str| {
        let at = words.windows(2).position(|w| w.join(" ") == before);
        at.and_then(|i| words.get(i.wrapping_sub(2))).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
    };
    for line in said.lines() {
        let mut quoted = line.split('\'').skip(1).step_by(2);
        let words: Vec<_> = line.split([' ', ',']).filter(|w| !w.is_empty()).collect();
        if line.contains("Compiling entry function") {
            kernel = quoted.next().zip(quoted.next());
            spilled = 0;
        } else if line.contains("spill stores") {
            spilled += number(&words, "spill stores") + number(&words, "spill loads");
        } else if let (Some((name, target)), Some(used)) = (kernel, words.iter().position(|w| *w == "Used")) {
            let registers = words.get(used + 1).copied().unwrap_or_default();
            lines.push(format!("{name} {target} {registers} {spilled}\n"));
            kernel = None;
        }
    }
    lines.sort();
    lines.concat()
}

/// All sources, by name.
fn sources(folder: &Path) -> Result<Vec<u8>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{FOLDER}: {e}"))?;
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        all.extend(fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?);
    }
    Ok(all)
}

/// FNV-1a, 64 bits; a test of `backend-cuda` compares it.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::{hash, resources};

    #[test]
    fn registers_and_spills_are_read() {
        let said = "ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
                    ptxas info    : Function properties for b\n\
                    \x20   8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                    ptxas info    : Used 128 registers, used 1 barriers\n\
                    ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
                    \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                    ptxas info    : Used 30 registers\n";
        assert_eq!(resources(said), "a sm_90a 30 0\nb sm_80 128 16\n");
    }

    #[test]
    fn the_hash_is_fnv() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}

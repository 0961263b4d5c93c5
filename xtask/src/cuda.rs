//! `cargo xtask cuda`: builds the kernels of `backend-cuda` and notes what they were built from.

use std::{fs, path::Path, process::Command};

const FOLDER: &str = "crates/backend-cuda/kernels";
/// The file that includes the others, and machine code for whom: Ampere and Ada, Hopper, and PTX that the driver
/// compiles once for what comes later.
const MAIN: &str = "all.cu";
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"];

/// Runs nvcc (the one of the environment variable NVCC, else of PATH) and writes the fatbin and the hash.
pub fn build(root: &Path) -> Result<(), String> {
    let folder = root.join(FOLDER);
    let nvcc = std::env::var_os("NVCC").unwrap_or_else(|| "nvcc".into());
    let targets = TARGETS.map(|t| format!("-gencode={t}"));
    let status = Command::new(nvcc)
        .args(["-std=c++17", "-O3", "-fatbin", "-compress-mode=size", "-o", "kernels.fatbin", MAIN])
        .args(&targets)
        .current_dir(&folder)
        .status();
    let status = status.map_err(|e| format!("cannot run nvcc: {e}; CUDA 13.0 has it, as a wheel too"))?;
    if !status.success() {
        return Err("nvcc failed".into());
    }
    let hash = format!("{:016x}\n", hash(&sources(&folder)?));
    fs::write(folder.join("kernels.hash"), hash).map_err(|e| format!("kernels.hash: {e}"))
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
    use super::hash;

    #[test]
    fn the_hash_is_fnv() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}

//! `cargo xtask cuda`: builds the kernels of `backend-cuda` and notes what they were built from.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const FOLDER: &str = "crates/backend-cuda/kernels";
/// The file that includes the others, and machine code for whom: Ampere, Ada, Hopper, Blackwell (servers, then cards),
/// and PTX that the driver compiles once for what comes later.
const MAIN: &str = "all.cu";
const TARGETS: [&str; 6] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
    "arch=compute_80,code=compute_80",
];
/// Instructions of the tensor cores, those of Hopper's warpgroups first.
const MATRIX: [&str; 3] = ["QGMMA", "HGMMA", "HMMA"];

/// Runs nvcc (the one of the environment variable NVCC, else of PATH) and writes the fatbin, the hash of its sources
/// and what ptxas and cuobjdump (beside nvcc) say of each kernel, which a test of `backend-cuda` reads.
pub fn build(root: &Path) -> Result<(), String> {
    let folder = root.join(FOLDER);
    let nvcc = PathBuf::from(std::env::var_os("NVCC").unwrap_or_else(|| "nvcc".into()));
    let targets = TARGETS.map(|t| format!("-gencode={t}"));
    let output = Command::new(&nvcc)
        .args([
            "-std=c++17",
            "-O3",
            "-fatbin",
            "-compress-mode=size",
            "--threads=0",
            // Each kernel has shared memory of its own type.
            "-diag-suppress=1556",
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
    let code = Command::new(nvcc.with_file_name("cuobjdump"))
        .args(["-sass", "kernels.fatbin"])
        .current_dir(&folder)
        .output()
        .map_err(|e| format!("cannot run cuobjdump: {e}; CUDA has it, as a wheel too"))?;
    let used = matrix_instructions(&String::from_utf8_lossy(&code.stdout));
    fs::write(folder.join("resources.txt"), resources(&said, &used))
        .map_err(|e| format!("resources.txt: {e}"))?;
    let hash = format!("{:016x}\n", hash(&sources(&folder)?));
    fs::write(folder.join("kernels.hash"), hash).map_err(|e| format!("kernels.hash: {e}"))
}

/// Which of [`MATRIX`] each kernel (by name and target) uses, the first of them; from the machine code in words.
fn matrix_instructions(code: &str) -> HashMap<(String, String), usize> {
    let (mut target, mut kernel, mut used) = (String::new(), String::new(), HashMap::new());
    for line in code.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("arch = ") {
            target = name.into();
        } else if let Some(name) = line.strip_prefix("Function : ") {
            kernel = name.into();
        } else if let Some(found) = MATRIX.iter().position(|i| line.contains(i)) {
            let first = used.entry((kernel.clone(), target.clone())).or_insert(found);
            *first = found.min(*first);
        }
    }
    used
}

/// A line per kernel and target of what ptxas says: kernel, target, registers, bytes spilled (stores and loads, its own
/// functions included), and which instruction of the tensor cores it uses.
fn resources(said: &str, used_of: &HashMap<(String, String), usize>) -> String {
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
            let matrix = used_of.get(&(name.into(), target.into())).map_or("-", |i| MATRIX[*i]);
            lines.push(format!("{name} {target} {registers} {spilled} {matrix}\n"));
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
    use std::collections::HashMap;

    use super::{hash, matrix_instructions, resources};

    #[test]
    fn registers_and_spills_are_read() {
        let said = "ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
                    ptxas info    : Function properties for b\n\
                    \x20   8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                    ptxas info    : Used 128 registers, used 1 barriers\n\
                    ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
                    \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                    ptxas info    : Used 30 registers\n";
        let used = HashMap::from([(("a".into(), "sm_90a".into()), 1)]);
        assert_eq!(resources(said, &used), "a sm_90a 30 0 HGMMA\nb sm_80 128 16 -\n");
    }

    #[test]
    fn the_best_matrix_instruction_counts() {
        let code = "arch = sm_90a\n\t\tFunction : a\n /*00*/ HMMA.16816 R0;\n /*10*/ HGMMA.64x64x16 R4;\n\
                    Function : b\n";
        let used = HashMap::from([(("a".to_owned(), "sm_90a".to_owned()), 1)]);
        assert_eq!(matrix_instructions(code), used);
    }

    #[test]
    fn the_hash_is_fnv() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}

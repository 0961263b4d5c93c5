//! Which SIMD level this CPU has, and which one to use.

use std::{fmt, str::FromStr};

use oxseek_tensor::Error;

use crate::simd::{self, Kernels};

/// A set of kernels that a CPU may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// No intrinsics; what every CPU runs.
    Scalar,
    /// aarch64 NEON.
    Neon,
    /// x86-64 AVX2 with FMA and F16C.
    Avx2,
    /// x86-64 AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 AVX-512 with VNNI, BF16 and VBMI as well: Zen 4, Sapphire Rapids and later.
    Avx512Vnni,
}

impl Level {
    const ALL: [Level; 5] = [Level::Scalar, Level::Neon, Level::Avx2, Level::Avx512, Level::Avx512Vnni];

    /// The best level that this CPU runs.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Level::Scalar)
    }

    /// Every level that this CPU runs, the best last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|l| l.kernels().is_some()).collect()
    }

    /// This level's kernels, if the CPU runs them.
    pub(crate) fn kernels(self) -> Option<&'static Kernels> {
        match self {
            Level::Scalar => Some(&simd::portable::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(&simd::avx2::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => (Level::Avx2.kernels().is_some()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(&simd::avx512::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => (Level::Avx512.kernels().is_some()
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512vbmi"))
            .then_some(&simd::avx512_vnni::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => Some(&simd::neon::KERNELS),
            #[allow(unreachable_patterns, reason = "levels of other architectures")]
            _ => None,
        }
    }

    /// The kernels of the level that was asked for, or of the best one.
    pub(crate) fn choose(forced: Option<Level>) -> Result<(Level, &'static Kernels), Error> {
        let level = forced.unwrap_or_else(Self::detect);
        let has = || Self::available().iter().map(Level::to_string).collect::<Vec<_>>().join(", ");
        match level.kernels() {
            Some(kernels) => Ok((level, kernels)),
            None => Err(Error::Device(format!("this CPU does not run level {level}; it runs {}", has()))),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Scalar => "scalar",
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512-vnni",
        })
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let find = Self::ALL.into_iter().find(|l| l.to_string().eq_ignore_ascii_case(s));
        find.ok_or_else(|| format!("{s:?} is no SIMD level: scalar, avx2, avx512, avx512-vnni or neon"))
    }
}

/// The CPU's name, for people.
pub(crate) fn cpu_description() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim().to_string()));
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_parse_as_they_print() {
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
        assert!("sse9".parse::<Level>().is_err());
    }

    #[test]
    fn a_level_of_another_architecture_is_refused_by_name() {
        let foreign = if cfg!(target_arch = "aarch64") { Level::Avx2 } else { Level::Neon };
        let Err(Error::Device(why)) = Level::choose(Some(foreign)) else { panic!("accepted {foreign}") };
        assert!(why.contains(&foreign.to_string()), "{why}");
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn neon_is_there() {
        assert_eq!(Level::detect(), Level::Neon);
    }
}

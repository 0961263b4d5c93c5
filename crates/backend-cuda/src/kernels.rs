//! The kernels: names, the fatbin that holds them, and the sources that it was built from.
//!
//! `cargo xtask cuda` builds the fatbin with nvcc and notes the hash of the sources beside it; a plain build needs
//! neither nvcc nor a GPU.

/// Machine code for several GPUs, built from [`SOURCES`].
pub(crate) const FATBIN: &[u8] = include_bytes!("../kernels/kernels.fatbin");

macro_rules! kernels {
    ($($variant:ident = $name:literal,)*) => {
        /// A kernel of the fatbin.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum Kernel {
            $(#[doc = $name] $variant,)*
        }

        impl Kernel {
            /// Every kernel's name, in the order of the variants.
            pub(crate) const NAMES: &[&'static str] = &[$($name,)*];
        }
    };
}

kernels! {
    Embed = "embed",
    RmsNorm = "rms_norm",
    Matmul = "matmul",
    RopeQueries = "rope_queries",
    MlaAppend = "mla_append",
    MlaAbsorb = "mla_absorb",
    MlaMean = "mla_mean",
    MlaValues = "mla_values",
    Swiglu = "swiglu",
    MoeInner = "moe_inner",
    MoeSum = "moe_sum",
    Route = "route",
    GatherRows = "gather_rows",
    Concat = "concat",
    RoundRows = "round_rows",
    SplitKvB = "split_kv_b",
    MoeGroup = "moe_group",
    ExpertsSum = "experts_sum",
    ExpertsSumNorm = "experts_sum_norm",
    GateLogits = "gate_logits",
    GateAndRoute = "gate_and_route",
    NormGateAndRoute = "norm_gate_and_route",
    Absorb = "absorb",
    RoundQueries = "round_queries",
    AbsorbRows = "absorb_rows",
    AttendBlock = "attend_block",
    AttendRow = "attend_row",
    AttendRows = "attend_rows",
    ValuesRows = "values_rows",
    AttendValues1 = "attend_values_1",
    AttendValues8 = "attend_values_8",
    FillRandom = "fill_random",
    ProductBf16Narrow = "product_bf16_narrow",
    ProductBf16Wide = "product_bf16_wide",
    ProductBf16Split = "product_bf16_split",
    ProductFp8Split = "product_fp8_split",
    ProductFp8Narrow = "product_fp8_narrow",
    ProductFp8Wide = "product_fp8_wide",
    InnerBf16Narrow = "inner_bf16_narrow",
    InnerBf16Wide = "inner_bf16_wide",
    InnerFp8Narrow = "inner_fp8_narrow",
    InnerFp8Wide = "inner_fp8_wide",
    OuterBf16Narrow = "outer_bf16_narrow",
    OuterBf16Wide = "outer_bf16_wide",
    OuterFp8Narrow = "outer_fp8_narrow",
    OuterFp8Wide = "outer_fp8_wide",
    StreamBf16x8 = "stream_bf16_8",
    StreamBf16x16 = "stream_bf16_16",
    StreamFp8x8 = "stream_fp8_8",
    StreamFp8x16 = "stream_fp8_16",
    StreamInnerBf16 = "stream_inner_bf16",
    StreamOuterBf16 = "stream_outer_bf16",
    StreamInnerFp8 = "stream_inner_fp8",
    StreamOuterFp8 = "stream_outer_fp8",
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of `xtask/src/cuda.rs` that are machine code.
    const TARGETS: &[&str] = &["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"];
    const FATBIN_BYTES_MAX: usize = 1_500_000;

    const SOURCES: &[&[u8]] = &[
        include_bytes!("../kernels/all.cu"),
        include_bytes!("../kernels/attention.cu"),
        include_bytes!("../kernels/cache.cuh"),
        include_bytes!("../kernels/formats.cuh"),
        include_bytes!("../kernels/gemm.cu"),
        include_bytes!("../kernels/native.cu"),
        include_bytes!("../kernels/plain.cu"),
        include_bytes!("../kernels/step.cuh"),
        include_bytes!("../kernels/stream.cu"),
        include_bytes!("../kernels/work.cuh"),
    ];

    /// FNV-1a, 64 bits, over the sources in the order of their names; `xtask/src/cuda.rs` writes it.
    fn hash(sources: &[&[u8]]) -> u64 {
        sources.iter().copied().flatten().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    #[test]
    fn the_fatbin_was_built_from_these_sources() {
        let noted = include_str!("../kernels/kernels.hash").trim();
        assert_eq!(noted, format!("{:016x}", hash(SOURCES)), "run `cargo xtask cuda`");
    }

    /// What ptxas said when the fatbin was built: a spilled register is a slow kernel that nobody meant.
    #[test]
    fn every_kernel_was_built_for_each_target_and_none_spills() {
        let said = include_str!("../kernels/resources.txt");
        for target in TARGETS {
            for name in Kernel::NAMES {
                let of_kernel = format!("{name} {target} ");
                let line = said.lines().find(|l| l.starts_with(&of_kernel));
                let spilled = line.and_then(|l| l.split(' ').nth(3));
                assert_eq!(spilled, Some("0"), "{of_kernel}: {line:?}");
            }
        }
        assert_eq!(said.lines().count(), TARGETS.len() * Kernel::NAMES.len(), "kernels that nobody launches");
    }

    /// Hopper's tensor cores give their speed only to warpgroups.
    #[test]
    fn products_of_many_tokens_use_the_best_instruction() {
        let said = include_str!("../kernels/resources.txt");
        let matrix = |name: &str, target: &str| {
            let of_kernel = format!("{name} {target} ");
            said.lines()
                .find(|l| l.starts_with(&of_kernel))
                .and_then(|l| l.split(' ').nth(4))
                .unwrap_or_default()
        };
        let wide =
            |name: &&&str| ["_narrow", "_wide", "_rows", "attend_row"].iter().any(|end| name.ends_with(end));
        for name in Kernel::NAMES.iter().filter(wide).filter(|n| !["gather_rows", "round_rows"].contains(n)) {
            assert_eq!(matrix(name, "sm_90a"), "HGMMA", "{name}");
            // `attend_row` and `attend_rows` are for Hopper only.
            let elsewhere = if name.starts_with("attend_row") { "-" } else { "HMMA" };
            for target in TARGETS.iter().filter(|t| **t != "sm_90a") {
                assert_eq!(matrix(name, target), elsewhere, "{name} {target}");
            }
        }
    }

    #[test]
    fn the_fatbin_has_code_for_each_target_and_ptx() {
        let number = |at: usize, bytes: usize| {
            FATBIN[at..at + bytes].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b))
        };
        // A header, then pieces, each with its kind, the length of its own header, of what it holds, and for whom.
        let (mut at, mut found) = (number(6, 2), Vec::new());
        while at < FATBIN.len() {
            let code = match number(at, 2) {
                1 => "compute",
                _ => "sm",
            };
            // A target of its own generation alone ends with a letter, which stands in a flag.
            let own = if number(at + 40, 8) & 0x10_0000 == 0 { "" } else { "a" };
            found.push(format!("{code}_{}{own}", number(at + 28, 4)));
            at += number(at + 4, 4) + number(at + 8, 8);
        }
        found.sort();
        let mut expected = [&["compute_80"], TARGETS].concat();
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert!(FATBIN.len() < FATBIN_BYTES_MAX, "{} bytes", FATBIN.len());
    }

    #[test]
    fn the_fatbin_is_one() {
        // The first word of a fatbin (fatbinary_section.h).
        assert_eq!(FATBIN[..4], 0xba55_ed50_u32.to_le_bytes());
    }
}

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
    Absorb = "absorb",
    RoundQueries = "round_queries",
    AbsorbRows = "absorb_rows",
    AttendBlock = "attend_block",
    AttendRows = "attend_rows",
    ValuesRows = "values_rows",
    AttendValues1 = "attend_values_1",
    AttendValues8 = "attend_values_8",
    FillRandom = "fill_random",
    ProductBf16Narrow = "product_bf16_narrow",
    ProductBf16Wide = "product_bf16_wide",
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
        for target in ["sm_80", "sm_90a"] {
            for name in Kernel::NAMES {
                let of_kernel = format!("{name} {target} ");
                let line = said.lines().find(|l| l.starts_with(&of_kernel));
                assert!(line.is_some_and(|l| l.ends_with(" 0")), "{of_kernel}: {line:?}");
            }
        }
        assert_eq!(said.lines().count(), 2 * Kernel::NAMES.len(), "kernels that nobody launches");
    }

    #[test]
    fn the_fatbin_is_one() {
        // The first word of a fatbin (fatbinary_section.h).
        assert_eq!(FATBIN[..4], 0xba55_ed50_u32.to_le_bytes());
    }
}

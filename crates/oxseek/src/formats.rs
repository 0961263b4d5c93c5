//! Storage formats on the command line, and which of them a tensor can have.

use oxseek_tensor::DType;

/// The format that users call `name`, in any case.
pub fn parse(name: &str) -> Result<DType, String> {
    let wanted = name.to_ascii_uppercase();
    let alias = if wanted == "FP8" { "F8_E4M3" } else { &wanted };
    DType::ALL.into_iter().find(|d| d.name() == alias).ok_or_else(|| {
        let all: Vec<String> = DType::ALL.iter().map(|d| label(*d)).collect();
        format!("there is no format {name}; there are {}", all.join(", "))
    })
}

/// As users type it.
pub fn label(dtype: DType) -> String {
    match dtype {
        DType::F8E4M3 => "fp8".into(),
        other => other.name().to_ascii_lowercase(),
    }
}

/// What llama-quantize takes where rows are no whole number of super-blocks of 256: something like it in blocks of 32.
const INSTEAD: [(DType, DType); 6] = [
    (DType::Q2K, DType::Q4_0),
    (DType::Q3K, DType::Q4_0),
    (DType::Q4K, DType::Q5_0),
    (DType::Q5K, DType::Q5_1),
    (DType::Q6K, DType::Q8_0),
    (DType::IQ4_XS, DType::IQ4_NL),
];

/// `wanted`, or what stands in for it in rows of `cols`: blocks of 32 for super-blocks, F16 where those do not fit.
pub fn fitting(wanted: DType, cols: usize) -> DType {
    let fits = |d: &DType| cols.is_multiple_of(d.block_len());
    let instead = || INSTEAD.iter().find(|(of, _)| *of == wanted).map(|(_, instead)| *instead);
    Some(wanted).filter(fits).or_else(|| instead().filter(fits)).unwrap_or(DType::F16)
}

/// Metadata: which format most of a file's weights have.
pub const FILE_TYPE_KEY: &str = "general.file_type";
/// Metadata: the version of the block formats.
pub const QUANTIZATION_VERSION_KEY: &str = "general.quantization_version";
/// The one that is in use.
pub const QUANTIZATION_VERSION: u32 = 2;

/// llama.cpp's numbers for [`FILE_TYPE_KEY`].
const FILE_TYPES: [(&str, u32); 16] = [
    ("F32", 0),
    ("F16", 1),
    ("Q4_0", 2),
    ("Q4_1", 3),
    ("Q8_0", 7),
    ("Q5_0", 8),
    ("Q5_1", 9),
    ("Q2_K", 10),
    ("Q3_K", 11),
    ("Q4_K", 14),
    ("Q5_K", 16),
    ("Q6_K", 18),
    ("IQ4_NL", 25),
    ("IQ4_XS", 30),
    ("MXFP4", 38),
    ("BF16", 32),
];

/// The number of a file that is mostly `dtype`; that of unknown ones for formats that have none.
pub fn file_type(dtype: DType) -> u32 {
    const UNKNOWN: u32 = 1024;
    FILE_TYPES.iter().find(|(name, _)| *name == dtype.name()).map_or(UNKNOWN, |(_, n)| *n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_have_names_and_stand_ins() {
        assert_eq!(parse("q8_0"), Ok(DType::Q8_0));
        assert_eq!(parse("Q4_K"), Ok(DType::Q4K));
        assert_eq!(parse("fp8"), Ok(DType::F8E4M3));
        assert!(parse("q7").is_err_and(|e| e.contains("q8_0")));
        assert_eq!(fitting(DType::Q4K, 512), DType::Q4K);
        assert_eq!(fitting(DType::Q4K, 384), DType::Q5_0);
        assert_eq!(fitting(DType::Q8_0, 40), DType::F16);
    }
}

//! Which format each tensor gets: the rules of llama-quantize.

use oxseek_tensor::DType;

use super::input::Input;
use crate::formats::{self, file_type, fitting};

/// A format for most weights, and what differs from it.
#[derive(Debug, Clone)]
pub struct Scheme {
    /// What was asked for.
    pub target: Target,
    /// Everything in the one format, the head too.
    pub pure: bool,
    /// The head's format.
    pub output: Option<DType>,
    /// The embedding's format.
    pub embedding: Option<DType>,
    /// The head is the embedding.
    pub tied: bool,
    /// Layers, MTP layers included.
    pub layers: usize,
    /// Weights are rounded to this format, in blocks that may run across the ends of rows, and stored as F32: what a
    /// format with long blocks costs a model whose rows are short.
    pub through: Option<DType>,
}

/// `--format`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    dtype: DType,
    /// The `_M` mixture of a K-quant: some of what is added to the residual stream gets more bits.
    mixture: bool,
}

impl Target {
    /// One format for all.
    pub fn plain(dtype: DType) -> Self {
        Self { dtype, mixture: false }
    }

    /// A format's name, or `q4_k_m` or `q5_k_m`.
    pub fn parse(name: &str) -> Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "q4_k_m" => Ok(Self { dtype: DType::Q4K, mixture: true }),
            "q5_k_m" => Ok(Self { dtype: DType::Q5K, mixture: true }),
            "fp8" | "f8_e4m3" => Err("GGUF files have no fp8".into()),
            other => formats::parse(other).map(Self::plain),
        }
    }
}

impl Scheme {
    /// The number by which llama.cpp knows it.
    pub fn file_type(&self) -> u32 {
        // The mixture's number follows that of the K-quant without it.
        file_type(self.target.dtype) + u32::from(self.target.mixture)
    }

    /// What a tensor is rounded to before it is stored.
    pub fn through(&self, input: &Input) -> Option<DType> {
        self.through.filter(|_| !is_exact(input))
    }

    /// The format of a tensor.
    pub fn dtype(&self, input: &Input) -> DType {
        if is_exact(input) {
            return DType::F32;
        }
        fitting(self.wanted(&input.name, input.cols()), input.cols())
    }

    fn wanted(&self, name: &str, cols: usize) -> DType {
        let target = self.target.dtype;
        let embedding = name == "token_embd.weight";
        if let Some(dtype) = self.embedding.filter(|_| embedding) {
            return dtype;
        }
        let head = name == "output.weight" || embedding && self.tied;
        if let Some(dtype) = self.output.filter(|_| head) {
            return dtype;
        }
        if self.pure || target.block_len() == 1 {
            return target;
        }
        if target == DType::MXFP4 {
            // Made for experts.
            return if name.contains("_exps") { target } else { DType::Q8_0 };
        }
        if head {
            return if target == DType::Q8_0 || fitting(target, cols) != target {
                DType::Q8_0
            } else {
                DType::Q6K
            };
        }
        let sensitive = name.contains("ffn_down") || name.contains("attn_kv_b");
        let more = self.target.mixture && sensitive && layer(name).is_some_and(|l| self.has_more_bits(l));
        if more { DType::Q6K } else { target }
    }

    /// The first and the last eighth of the layers, and every third between them.
    fn has_more_bits(&self, layer: usize) -> bool {
        let eighth = self.layers / 8;
        layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2
    }
}

/// Vectors, routers and their bias decide too much for what they weigh.
fn is_exact(input: &Input) -> bool {
    let name = &input.name;
    input.shape.len() < 2
        || !name.ends_with(".weight")
        || name.ends_with("_norm.weight")
        || name.contains("ffn_gate_inp")
}

/// The layer of `blk.N.`
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheme(format: &str) -> Scheme {
        let target = Target::parse(format).unwrap();
        Scheme { target, pure: false, output: None, embedding: None, tied: false, layers: 24, through: None }
    }

    #[test]
    fn the_rules_are_those_of_llama_quantize() {
        let s = scheme("q4_k_m");
        assert_eq!(s.file_type(), 15);
        assert_eq!(s.wanted("output.weight", 2048), DType::Q6K);
        assert_eq!(s.wanted("token_embd.weight", 2048), DType::Q4K);
        assert_eq!(s.wanted("blk.7.attn_output.weight", 2048), DType::Q4K);
        let with_more: Vec<usize> = (0..24)
            .filter(|l| s.wanted(&format!("blk.{l}.ffn_down_exps.weight"), 2048) == DType::Q6K)
            .collect();
        assert_eq!(with_more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
        assert_eq!(scheme("q4_0").wanted("output.weight", 384), DType::Q6K);
        assert_eq!(scheme("q8_0").wanted("output.weight", 384), DType::Q8_0);
        assert_eq!(scheme("q4_k").wanted("output.weight", 384), DType::Q8_0);
        assert_eq!(scheme("mxfp4").wanted("blk.1.attn_q_a.weight", 384), DType::Q8_0);
        assert_eq!(scheme("mxfp4").wanted("blk.1.ffn_up_exps.weight", 384), DType::MXFP4);
        assert_eq!(scheme("bf16").wanted("output.weight", 384), DType::BF16);
    }

    #[test]
    fn what_is_asked_for_comes_first() {
        let pure = Scheme { pure: true, ..scheme("q4_k") };
        assert_eq!(pure.wanted("output.weight", 2048), DType::Q4K);
        let own = Scheme { output: Some(DType::F16), embedding: Some(DType::Q8_0), ..scheme("q4_0") };
        assert_eq!(own.wanted("output.weight", 384), DType::F16);
        assert_eq!(own.wanted("token_embd.weight", 384), DType::Q8_0);
        let tied = Scheme { tied: true, ..scheme("q4_0") };
        assert_eq!(tied.wanted("token_embd.weight", 384), DType::Q6K);
        assert!(Target::parse("fp8").is_err());
    }
}

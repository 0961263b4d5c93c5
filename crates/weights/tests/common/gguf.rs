//! GGUF files made in memory: sound ones with the crate's own writer, others byte by byte.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_tensor::{ByteRegion, DType};
use oxseek_weights::{
    Checkpoint, Error,
    gguf::{Array, GgmlType, GgufWriter, Value},
};

use super::f32s;

/// Name of the file.
pub const FILE: &str = "model.gguf";

/// A model to write.
#[derive(Clone)]
pub struct Model {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<(String, GgmlType, Vec<usize>, Vec<u8>)>,
}

impl Model {
    /// A small V3 with new keys, groups, YaRN and two layers, and the tensors that the tests ask for.
    pub fn tiny() -> Self {
        let metadata = [
            ("general.architecture", "deepseek2".into()),
            ("deepseek2.block_count", 2u32.into()),
            ("deepseek2.context_length", 4096u32.into()),
            ("deepseek2.embedding_length", 32u32.into()),
            ("deepseek2.feed_forward_length", 64u32.into()),
            ("deepseek2.expert_feed_forward_length", 32u32.into()),
            ("deepseek2.attention.head_count", 2u32.into()),
            ("deepseek2.attention.head_count_kv", 1u32.into()),
            ("deepseek2.attention.q_lora_rank", 32u32.into()),
            ("deepseek2.attention.kv_lora_rank", 32u32.into()),
            ("deepseek2.attention.key_length", 36u32.into()),
            ("deepseek2.attention.value_length", 32u32.into()),
            ("deepseek2.attention.key_length_mla", 36u32.into()),
            ("deepseek2.attention.value_length_mla", 2u32.into()),
            ("deepseek2.attention.layer_norm_rms_epsilon", 1e-6f32.into()),
            ("deepseek2.rope.dimension_count", 4u32.into()),
            ("deepseek2.rope.freq_base", 10_000f32.into()),
            ("deepseek2.rope.scaling.type", "yarn".into()),
            ("deepseek2.rope.scaling.factor", 40f32.into()),
            ("deepseek2.rope.scaling.original_context_length", 4096u32.into()),
            ("deepseek2.rope.scaling.yarn_log_multiplier", 0.1f32.into()),
            ("deepseek2.leading_dense_block_count", 1u32.into()),
            ("deepseek2.expert_count", 8u32.into()),
            ("deepseek2.expert_used_count", 2u32.into()),
            ("deepseek2.expert_shared_count", 1u32.into()),
            ("deepseek2.expert_group_count", 4u32.into()),
            ("deepseek2.expert_group_used_count", 2u32.into()),
            ("deepseek2.expert_weights_scale", 2.5f32.into()),
            ("deepseek2.expert_weights_norm", true.into()),
            ("deepseek2.expert_gating_func", 2u32.into()),
            ("deepseek2.vocab_size", 64u32.into()),
            ("tokenizer.ggml.model", "gpt2".into()),
            ("tokenizer.ggml.tokens", Array::texts(["a", "b"]).into()),
            ("tokenizer.ggml.bos_token_id", 0u32.into()),
            ("tokenizer.ggml.eos_token_id", 1u32.into()),
        ];
        let metadata = metadata.into_iter().map(|(k, v): (&str, Value)| (k.to_string(), v)).collect();
        let ramp = |n: usize| (0..n).map(|i| i as f32 / 8.0).collect::<Vec<_>>();
        Self { metadata, tensors: Vec::new() }
            .tensor("token_embd.weight", &[64, 32], &ramp(64 * 32))
            .tensor("output.weight", &[64, 32], &ramp(64 * 32))
            .tensor("output_norm.weight", &[32], &ramp(32))
            .tensor("blk.0.attn_k_b.weight", &[2, 32, 32], &ramp(2 * 32 * 32))
            .tensor("blk.0.attn_v_b.weight", &[2, 2, 32], &ramp(2 * 2 * 32))
            .tensor("blk.1.ffn_gate_exps.weight", &[8, 32, 32], &ramp(8 * 32 * 32))
            .tensor("blk.1.exp_probs_b.bias", &[8], &ramp(8))
    }

    /// With a metadata entry put in or replaced.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.into(), value)),
        }
        self
    }

    /// Without a metadata entry.
    pub fn without(mut self, key: &str) -> Self {
        assert!(self.metadata.iter().any(|(k, _)| k == key), "{key}");
        self.metadata.retain(|(k, _)| k != key);
        self
    }

    /// With an F32 tensor put in or replaced.
    pub fn tensor(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.stored(name, DType::F32, shape, f32s(values))
    }

    /// With a tensor put in or replaced.
    pub fn stored(self, name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Self {
        let mut model = self.less(name);
        model.tensors.push((name.into(), GgmlType::of(dtype).unwrap(), shape.into(), bytes));
        model
    }

    /// Without a tensor.
    pub fn less(mut self, name: &str) -> Self {
        self.tensors.retain(|(n, ..)| n != name);
        self
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.metadata {
            writer.set(key, value.clone()).unwrap();
        }
        for (name, kind, shape, _) in &self.tensors {
            writer.tensor(name, *kind, shape).unwrap();
        }
        let mut body = writer.begin(Vec::new()).unwrap();
        for (.., bytes) in &self.tensors {
            body.write(bytes).unwrap();
        }
        body.finish().unwrap()
    }

    /// The file as a checkpoint.
    pub fn open(&self) -> Result<Checkpoint, Error> {
        open(self.bytes())
    }
}

/// A file as a checkpoint.
pub fn open(bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    Checkpoint::from_files(vec![(FILE.into(), ByteRegion::from_vec(bytes))])
}

/// What a file begins with.
pub fn head(version: u32, tensors: u64, keys: u64) -> Vec<u8> {
    [b"GGUF".as_slice(), &version.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
}

/// A text as a file has it.
pub fn text(text: &[u8]) -> Vec<u8> {
    [(text.len() as u64).to_le_bytes().as_slice(), text].concat()
}

/// A metadata entry.
pub fn key(key: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key).as_slice(), &kind.to_le_bytes(), value].concat()
}

/// A list as a file has it.
pub fn list(kind: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &len.to_le_bytes(), elements].concat()
}

/// What a file says of a tensor; sizes are innermost first.
pub fn info(name: &[u8], sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dimensions = (sizes.len() as u32).to_le_bytes();
    let sizes: Vec<u8> = sizes.iter().flat_map(|n| n.to_le_bytes()).collect();
    [text(name).as_slice(), &dimensions, &sizes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

//! The configurations of the published models parse to their values, and FP8 blocks decode to theirs.
#![allow(clippy::float_cmp, reason = "the values are exact")]

mod common;

use common::{f32s, regions, safetensors};
use oxseek_tensor::{
    backend::Scoring,
    dtype::{e4m3_to_f32, f32_to_bf16},
};
use oxseek_weights::{Checkpoint, ModelConfig, TopkMethod, Yarn};

const V2_LITE: &str = r#"{
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
  "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
  "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
  "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
  "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
  "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
}"#;

const V2: &str = r#"{
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "bos_token_id": 100000,
  "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120,
  "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 128,
  "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "tie_word_embeddings": false,
  "topk_group": 3, "topk_method": "group_limited_greedy", "v_head_dim": 128, "vocab_size": 102400
}"#;

const V3: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
  "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
  "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
  "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
  "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128,
  "vocab_size": 129280
}"#;

const KIMI_K2: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "bos_token_id": 163584,
  "eos_token_id": 163585, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168,
  "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
  "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 8,
  "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
  "vocab_size": 163840
}"#;

const MOONLIGHT: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "bos_token_id": 163584,
  "eos_token_id": 163586, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
  "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192,
  "model_type": "deepseek_v3", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
  "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": true, "num_attention_heads": 16,
  "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
  "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
  "vocab_size": 163840
}"#;

fn yarn(factor: f64, beta_fast: f64, mscale: f64) -> Yarn {
    Yarn {
        factor,
        original_max_position_embeddings: 4096.0,
        beta_fast,
        beta_slow: 1.0,
        mscale: Some(mscale),
        mscale_all_dim: Some(mscale),
        attention_factor: None,
    }
}

fn v2_lite() -> ModelConfig {
    ModelConfig {
        model_type: "deepseek_v2".into(),
        vocab_size: 102_400,
        hidden_size: 2048,
        num_hidden_layers: 27,
        num_attention_heads: 16,
        q_lora_rank: None,
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        intermediate_size: 10_944,
        moe_intermediate_size: 1408,
        n_routed_experts: 64,
        n_shared_experts: 2,
        num_experts_per_tok: 6,
        n_group: 1,
        topk_group: 1,
        first_k_dense_replace: 1,
        moe_layer_freq: 1,
        mlp_layer_types: None,
        scoring: Scoring::Softmax,
        topk_method: TopkMethod::Greedy,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        yarn: Some(yarn(40.0, 32.0, 0.707)),
        rope_interleave: true,
        max_position_embeddings: 163_840,
        num_nextn_predict_layers: 0,
        tie_word_embeddings: false,
        bos_token_id: Some(100_000),
        eos_token_ids: vec![100_001],
    }
}

fn v2() -> ModelConfig {
    ModelConfig {
        hidden_size: 5120,
        num_hidden_layers: 60,
        num_attention_heads: 128,
        q_lora_rank: Some(1536),
        intermediate_size: 12_288,
        moe_intermediate_size: 1536,
        n_routed_experts: 160,
        n_group: 8,
        topk_group: 3,
        topk_method: TopkMethod::GroupLimitedGreedy,
        routed_scaling_factor: 16.0,
        ..v2_lite()
    }
}

fn v3() -> ModelConfig {
    ModelConfig {
        model_type: "deepseek_v3".into(),
        vocab_size: 129_280,
        hidden_size: 7168,
        num_hidden_layers: 61,
        intermediate_size: 18_432,
        moe_intermediate_size: 2048,
        n_routed_experts: 256,
        n_shared_experts: 1,
        num_experts_per_tok: 8,
        topk_group: 4,
        first_k_dense_replace: 3,
        scoring: Scoring::Sigmoid,
        topk_method: TopkMethod::NoauxTc,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        yarn: Some(yarn(40.0, 32.0, 1.0)),
        num_nextn_predict_layers: 1,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        ..v2()
    }
}

fn kimi_k2() -> ModelConfig {
    ModelConfig {
        model_type: "kimi_k2".into(),
        vocab_size: 163_840,
        num_attention_heads: 64,
        n_routed_experts: 384,
        n_group: 1,
        topk_group: 1,
        first_k_dense_replace: 1,
        routed_scaling_factor: 2.827,
        rope_theta: 50_000.0,
        yarn: Some(yarn(32.0, 1.0, 1.0)),
        max_position_embeddings: 131_072,
        num_nextn_predict_layers: 0,
        bos_token_id: Some(163_584),
        eos_token_ids: vec![163_585],
        ..v3()
    }
}

fn moonlight() -> ModelConfig {
    ModelConfig {
        model_type: "deepseek_v3".into(),
        vocab_size: 163_840,
        intermediate_size: 11_264,
        scoring: Scoring::Sigmoid,
        topk_method: TopkMethod::NoauxTc,
        norm_topk_prob: true,
        routed_scaling_factor: 2.446,
        rms_norm_eps: 1e-5,
        rope_theta: 50_000.0,
        yarn: None,
        max_position_embeddings: 8192,
        bos_token_id: Some(163_584),
        eos_token_ids: vec![163_586],
        ..v2_lite()
    }
}

#[test]
fn published_configurations_parse() {
    let published = [
        ("V2-Lite", V2_LITE, v2_lite()),
        ("V2", V2, v2()),
        ("V3", V3, v3()),
        ("Kimi-K2", KIMI_K2, kimi_k2()),
        ("Moonlight", MOONLIGHT, moonlight()),
    ];
    for (name, json, want) in published {
        assert_eq!(ModelConfig::parse(json.as_bytes(), None).unwrap(), want, "{name}");
        let first = want.first_k_dense_replace;
        assert!(!want.is_moe_layer(first - 1) && want.is_moe_layer(first), "{name}");
    }
}

#[test]
fn what_newer_files_leave_out_or_move_is_found() {
    // transformers 5 drops what the model type implies, and moves the rope into one object.
    let moved = V3
        .replace(r#""scoring_func": "sigmoid","#, "")
        .replace(r#""topk_method": "noaux_tc","#, "")
        .replace(r#""rope_theta": 10000,"#, "")
        .replace(
            r#""rope_scaling": {"#,
            r#""rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "#,
        );
    assert_eq!(ModelConfig::parse(moved.as_bytes(), None).unwrap(), v3());
    // DeepSeek's own files write 0 for no query rank, others null for no groups.
    let zero = MOONLIGHT
        .replace(r#""q_lora_rank": null"#, r#""q_lora_rank": 0"#)
        .replace(r#""n_group": 1"#, r#""n_group": null"#)
        .replace(r#""topk_group": 1"#, r#""topk_group": null"#);
    assert_eq!(ModelConfig::parse(zero.as_bytes(), None).unwrap(), moonlight());
}

#[test]
fn ends_of_both_files_count() {
    let ends = |generation: &str| {
        ModelConfig::parse(KIMI_K2.as_bytes(), Some(generation.as_bytes())).unwrap().eos_token_ids
    };
    assert_eq!(ends(r#"{"eos_token_id": 163586}"#), [163_585, 163_586]);
    assert_eq!(ends(r#"{"eos_token_id": [163586, 163585], "max_length": 1}"#), [163_585, 163_586]);
    assert_eq!(ends("{}"), [163_585]);
}

/// How a test's scales are stored: the type's name and the bytes of a power of two.
type ScaleFormat = (&'static str, fn(i32) -> Vec<u8>);

const SCALE_FORMATS: [ScaleFormat; 4] = [
    ("F32", |exponent| 2f32.powi(exponent).to_le_bytes().to_vec()),
    ("BF16", |exponent| f32_to_bf16(2f32.powi(exponent)).to_le_bytes().to_vec()),
    ("F8_E8M0", |exponent| vec![(127 + exponent) as u8]),
    ("U8", |exponent| vec![(127 + exponent) as u8]),
];

#[test]
fn partial_fp8_blocks_decode() {
    // 576 rows are those of kv_a_proj_with_mqa: the last block has 64.
    for (rows, cols) in [(1usize, 1usize), (128, 128), (129, 127), (300, 200), (576, 130), (127, 257)] {
        let (grid_rows, grid_cols) = (rows.div_ceil(128), cols.div_ceil(128));
        // Every code but the two NaNs, in an order that differs from row to row.
        let code = |i: usize, j: usize| ((i * 31 + j * 7) % 254 + 1) as u8;
        let safe = |c: u8| if c & 0x7f == 0x7f { 0x7e } else { c };
        let exponent = |block: usize| block as i32 % 9 - 4;
        let codes: Vec<u8> = (0..rows).flat_map(|i| (0..cols).map(move |j| safe(code(i, j)))).collect();
        for (dtype, encode) in SCALE_FORMATS {
            let scales: Vec<u8> = (0..grid_rows * grid_cols).flat_map(|b| encode(exponent(b))).collect();
            let file = safetensors(&[
                ("w", "F8_E4M3", &[rows, cols], &codes),
                ("w_scale_inv", dtype, &[grid_rows, grid_cols], &scales),
            ]);
            let files = vec![("config.json".into(), V3.into()), ("model.safetensors".into(), file)];
            let checkpoint = Checkpoint::from_files(regions(files)).unwrap();
            let matrix = checkpoint.matrix("w", rows, cols).unwrap();
            let mut row = vec![0.0; cols];
            for i in 0..rows {
                matrix.decode_row(i, &mut row);
                for (j, found) in row.iter().enumerate() {
                    let scale = 2f32.powi(exponent(i / 128 * grid_cols + j / 128));
                    let want = e4m3_to_f32(codes[i * cols + j]) * scale;
                    assert_eq!(*found, want, "{dtype} {rows}x{cols} at [{i}, {j}]");
                }
            }
        }
    }
}

#[test]
fn scales_of_any_value_decode() {
    // 0x38 is 1, 0x40 is 2: each value is its scale, or twice it.
    let scales = [0.005_580_36, 3.25, 1e-20, 0.0];
    let codes: Vec<u8> = (0..130).flat_map(|_| [0x38; 128].into_iter().chain([0x40; 2])).collect();
    let file = safetensors(&[
        ("w", "F8_E4M3", &[130, 130], &codes),
        ("w_scale_inv", "F32", &[2, 2], &f32s(&scales)),
    ]);
    let files = vec![("config.json".into(), V3.into()), ("model.safetensors".into(), file)];
    let matrix = Checkpoint::from_files(regions(files)).unwrap().matrix("w", 130, 130).unwrap();
    let mut row = vec![0.0; 130];
    for (i, want) in [(0, &scales[..2]), (127, &scales[..2]), (128, &scales[2..]), (129, &scales[2..])] {
        matrix.decode_row(i, &mut row);
        assert!(row[..128].iter().all(|v| *v == want[0]), "row {i}");
        assert!(row[128..].iter().all(|v| *v == 2.0 * want[1]), "row {i}");
    }
}

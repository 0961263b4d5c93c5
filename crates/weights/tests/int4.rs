//! INT4 checkpoints as compressed-tensors writes them (Kimi-K2-Thinking): loaded as they lie, hostile ones refused.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Tensor, regions, safetensors};
use oxseek_tensor::{DType, dtype::f32_to_bf16};
use oxseek_weights::{Checkpoint, Error};
use serde_json::{Value, json};

const NAME: &str = "model.layers.1.mlp.experts.0.up_proj.weight";
const ROWS: usize = 3;
const COLS: usize = 64;

fn config() -> Value {
    json!({
        "model_type": "kimi_k2", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 128, "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": null,
            "config_groups": {"group_0": {
                "input_activations": null, "output_activations": null, "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                    "symmetric": true, "actorder": null, "block_structure": null, "dynamic": false},
            }},
            "ignore": ["lm_head", "re:.*self_attn.*"],
        },
    })
}

/// Row `i` has the scales `i + 1` and `-2`, and codes that count up.
struct Parts {
    packed: (&'static str, Vec<usize>, Vec<u8>),
    scale: (&'static str, Vec<usize>, Vec<u8>),
    shape: (&'static str, Vec<usize>, Vec<u8>),
}

impl Parts {
    fn valid() -> Self {
        let packed = [0x7654_3210_u32, 0xfedc_ba98].map(u32::to_le_bytes).concat().repeat(ROWS * COLS / 16);
        let scales: Vec<u8> = (0..ROWS)
            .flat_map(|row| [row as f32 + 1.0, -2.0])
            .flat_map(|scale| f32_to_bf16(scale).to_le_bytes())
            .collect();
        let shape = [ROWS, COLS].map(|n| (n as i64).to_le_bytes()).concat();
        Self {
            packed: ("I32", vec![ROWS, COLS / 8], packed),
            scale: ("BF16", vec![ROWS, COLS / 32], scales),
            shape: ("I64", vec![2], shape),
        }
    }

    fn file(&self) -> Vec<u8> {
        let names = ["packed", "scale", "shape"].map(|part| format!("{NAME}_{part}"));
        let parts = [&self.packed, &self.scale, &self.shape];
        let tensors: Vec<Tensor<'_>> = names
            .iter()
            .zip(parts)
            .filter(|(_, part)| !part.0.is_empty())
            .map(|(name, (dtype, shape, bytes))| (name.as_str(), *dtype, shape.as_slice(), bytes.as_slice()))
            .collect();
        safetensors(&tensors)
    }
}

fn open(config: &Value, weights: Vec<u8>) -> Result<Checkpoint, Error> {
    Checkpoint::from_files(regions(vec![
        ("config.json".into(), config.to_string().into_bytes()),
        ("model.safetensors".into(), weights),
    ]))
}

#[test]
fn packed_weights_are_used_as_they_lie() {
    for wide in [true, false] {
        let mut parts = Parts::valid();
        if !wide {
            parts.shape = ("I32", vec![2], [ROWS, COLS].map(|n| (n as i32).to_le_bytes()).concat());
        }
        let checkpoint = open(&config(), parts.file()).unwrap();
        assert!(checkpoint.contains(NAME));
        let m = checkpoint.matrix(NAME, ROWS, COLS).unwrap();
        assert_eq!((m.dtype(), m.total_bytes()), (DType::INT4, ROWS * COLS / 2 + ROWS * 4));
        for row in 0..ROWS {
            let mut found = vec![0.0; COLS];
            m.decode_row(row, &mut found);
            for (i, found) in found.into_iter().enumerate() {
                let scale = if i < 32 { row as f32 + 1.0 } else { -2.0 };
                let want = scale * ((i % 16) as f32 - 8.0);
                assert!((found - want).abs() < 1e-6, "row {row} column {i}: {found}, not {want}");
            }
        }
        let parameters: u64 = checkpoint.tensors().map(|t| t.parameters).sum();
        assert_eq!(parameters, (ROWS * COLS) as u64);
    }
}

#[test]
fn spoiled_tensors_are_refused_by_name() {
    type Spoil = fn(&mut Parts);
    let cases: [(Spoil, &[&str]); 10] = [
        (|p| p.scale.0 = "", &["weight_scale", "is missing", "[3, 2]"]),
        (|p| p.shape.0 = "", &["weight_shape", "is missing"]),
        (
            |p| p.packed.1 = vec![ROWS * 2, COLS / 16],
            &["weight_packed", "expected shape [3, 8], found [6, 4]"],
        ),
        (|p| p.packed.0 = "F32", &["weight_packed", "expected I32, found F32"]),
        (|p| p.scale.1 = vec![2, ROWS], &["weight_scale", "expected shape [3, 2], found [2, 3]"]),
        (|p| p.scale.0 = "F16", &["weight_scale", "expected BF16, found F16"]),
        // A group of 64.
        (
            |p| p.scale = ("BF16", vec![ROWS, 1], vec![0; ROWS * 2]),
            &["weight_scale", "expected shape [3, 2], found [3, 1]"],
        ),
        (|p| p.shape.2[8] = 96, &["weight_shape", "expected [3, 64], found [3, 96]"]),
        (|p| p.shape.2[15] = 0x80, &["weight_shape", "expected [3, 64], found [3, -"]),
        (|p| p.shape = ("F32", vec![2], vec![0; 8]), &["weight_shape", "expected I32 or I64, found F32"]),
    ];
    for (spoil, want) in cases {
        let mut parts = Parts::valid();
        spoil(&mut parts);
        let error = open(&config(), parts.file()).unwrap().matrix(NAME, ROWS, COLS).unwrap_err().to_string();
        for want in want {
            assert!(error.contains(want), "{error:?} does not say {want:?}");
        }
    }
}

#[test]
fn other_ways_to_quantise_are_refused_by_field() {
    let weights = "/quantization_config/config_groups/group_0/weights";
    let cases = [
        (format!("{weights}/num_bits"), json!(8), "group_0.weights.num_bits: found 8, supported is 4"),
        (
            format!("{weights}/group_size"),
            json!(128),
            "group_0.weights.group_size: found 128, supported is 32",
        ),
        (format!("{weights}/symmetric"), json!(false), "weights.symmetric: found false, supported is true"),
        (format!("{weights}/strategy"), json!("channel"), "weights.strategy: found \"channel\""),
        (format!("{weights}/type"), json!("float"), "weights.type: found \"float\""),
        (format!("{weights}/actorder"), json!("group"), "weights.actorder: found \"group\""),
        (format!("{weights}/num_bits"), Value::Null, "weights.num_bits: missing"),
        (weights.into(), json!(4), "weights.num_bits: missing"),
        (
            "/quantization_config/config_groups/group_0/input_activations".into(),
            json!({"num_bits": 8}),
            "group_0.input_activations: found",
        ),
        ("/quantization_config/config_groups".into(), json!({}), "config_groups: expected groups"),
        ("/quantization_config/config_groups".into(), Value::Null, "config_groups: missing"),
        ("/quantization_config/format".into(), json!("marlin-24"), "format: found \"marlin-24\""),
        ("/quantization_config/kv_cache_scheme".into(), json!({"num_bits": 8}), "kv_cache_scheme: found"),
    ];
    for (at, value, want) in cases {
        let mut config = config();
        *config.pointer_mut(&at).unwrap() = value;
        let error = open(&config, Parts::valid().file()).unwrap_err().to_string().replace("\\\"", "\"");
        assert!(error.contains(want), "{error:?} does not say {want:?}");
    }
}

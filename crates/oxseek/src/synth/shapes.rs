//! Shapes of models, as their `config.json`.

use std::{fs, path::Path};

use oxseek_weights::ModelConfig;
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// The shapes that have a name.
const NAMES: [&str; 5] = ["tiny", "mid", "v2-lite", "moonlight", "v3"];

/// A shape.
pub struct Shape {
    /// `config.json`, without a quantization.
    pub json: Map<String, Value>,
    /// The same, checked.
    pub config: ModelConfig,
}

impl Shape {
    /// The shape called `name`, or of the `config.json` at that path, with `layers` layers instead of its own.
    pub fn find(name: &str, layers: Option<usize>) -> Result<Self, Failure> {
        let mut json = match named(name) {
            Some(json) => json,
            None => of_file(name)?,
        };
        json.remove("quantization_config");
        if let Some(layers) = layers {
            json.insert("num_hidden_layers".into(), layers.into());
        }
        let config = ModelConfig::parse(Value::Object(json.clone()).to_string().as_bytes(), None)
            .map_err(|e| Failure::Usage(format!("--shape {name}: {e}")))?;
        Ok(Self { json, config })
    }
}

fn of_file(name: &str) -> Result<Map<String, Value>, Failure> {
    let bad = |why: String| Failure::Usage(format!("--shape {name}: {why}"));
    let path = Path::new(name);
    if !path.exists() {
        return Err(bad(format!("no shape and no file has this name; shapes are {}", NAMES.join(", "))));
    }
    let path = if path.is_dir() { path.join("config.json") } else { path.into() };
    let text = fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| bad(format!("no config.json: {e}")))
}

fn named(name: &str) -> Option<Map<String, Value>> {
    let mut all = v3();
    let own = match name {
        "v3" => json!({}),
        "tiny" => json!({
            "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
            "q_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
            "moe_intermediate_size": 256, "intermediate_size": 1536, "vocab_size": 8192,
            "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        }),
        "mid" => json!({
            "hidden_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": 768, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "moe_intermediate_size": 1408, "intermediate_size": 11264, "vocab_size": 32768,
            "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        }),
        "v2-lite" => json!({
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
            "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": null, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408, "intermediate_size": 10944,
            "vocab_size": 102_400, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
            "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false,
            "routed_scaling_factor": 1.0, "bos_token_id": 100_000, "eos_token_id": 100_001,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
                "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
            },
        }),
        "moonlight" => json!({
            "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": null, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408, "intermediate_size": 11264,
            "vocab_size": 163_840, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 2.446, "rope_scaling": null, "rope_theta": 50000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "bos_token_id": 163_584, "eos_token_id": 163_585,
        }),
        _ => return None,
    };
    if let Value::Object(own) = own {
        all.extend(own);
    }
    Some(all)
}

fn v3() -> Map<String, Value> {
    let sizes = json!({
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "vocab_size": 129_280,
        "max_position_embeddings": 163_840,
    });
    let rules = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": false, "moe_layer_freq": 1,
        "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000, "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    });
    let maps = [sizes, rules].into_iter().filter_map(|json| match json {
        Value::Object(map) => Some(map),
        _ => None,
    });
    maps.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_shape_is_a_sound_model() {
        for name in NAMES {
            let shape = Shape::find(name, None).unwrap_or_else(|e| panic!("{name}: {e}"));
            let fewer = Shape::find(name, Some(4)).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(fewer.config.num_hidden_layers, 4);
            assert_eq!(fewer.config.hidden_size, shape.config.hidden_size);
        }
        let Err(e) = Shape::find("big", None) else { panic!("accepted") };
        assert!(e.to_string().contains("shapes are tiny, mid, v2-lite"), "{e}");
    }
}

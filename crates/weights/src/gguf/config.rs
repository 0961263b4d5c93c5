//! `deepseek2.*`: what the model is, as llama.cpp's converter describes it.

use oxseek_tensor::backend::Scoring;

use super::{Array, Gguf, Value};
use crate::{
    Error, ModelConfig, TopkMethod, Yarn,
    config::{EXPERTS_MAX, LAYERS_MAX, POSITIONS_MAX, SIZE_MAX},
};

/// The architecture that V2, V3, R1, Moonlight and Kimi-K2 have in llama.cpp.
pub(super) const ARCHITECTURE: &str = "deepseek2";
pub(super) const ARCHITECTURE_KEY: &str = "general.architecture";

/// Where the metadata has what `config.json` calls otherwise: for the errors of the checks that both share.
const KEYS: [(&str, &str); 7] = [
    ("qk_rope_head_dim", "rope.dimension_count"),
    ("num_attention_heads", "attention.head_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("num_experts_per_tok", "expert_used_count"),
    ("n_shared_experts", "expert_shared_count"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
];

/// Reads and checks the metadata.
pub(super) fn model_config(gguf: &Gguf, warnings: &mut Vec<String>) -> Result<ModelConfig, Error> {
    let k = Keys { gguf };
    check_architecture(gguf)?;
    let mut notes = Notes { file: gguf.file(), warnings };
    let layers = Layers::of(&k, &mut notes)?;
    let heads = Heads::of(&k)?;
    let routing = Routing::of(&k, &mut notes)?;
    let vocab_size = vocab_size(&k)?;
    let config = ModelConfig {
        model_type: match routing.scoring {
            Scoring::Softmax => "deepseek_v2".into(),
            Scoring::Sigmoid => "deepseek_v3".into(),
        },
        vocab_size,
        hidden_size: k.size("embedding_length", 1, SIZE_MAX)?,
        num_hidden_layers: layers.main,
        num_attention_heads: heads.count,
        q_lora_rank: k.size_if("attention.q_lora_rank", 0, SIZE_MAX)?.filter(|r| *r > 0),
        kv_lora_rank: k.size("attention.kv_lora_rank", 1, SIZE_MAX)?,
        qk_nope_head_dim: heads.nope,
        qk_rope_head_dim: heads.rope,
        v_head_dim: heads.value,
        intermediate_size: k.size("feed_forward_length", 1, SIZE_MAX)?,
        moe_intermediate_size: k.size_if("expert_feed_forward_length", 0, SIZE_MAX)?.unwrap_or(0),
        n_routed_experts: routing.experts,
        n_shared_experts: k.size_if("expert_shared_count", 0, EXPERTS_MAX)?.unwrap_or(0),
        num_experts_per_tok: routing.used,
        n_group: routing.groups,
        topk_group: routing.groups_kept,
        first_k_dense_replace: k.size_if("leading_dense_block_count", 0, LAYERS_MAX)?.unwrap_or(0),
        moe_layer_freq: 1,
        mlp_layer_types: None,
        scoring: routing.scoring,
        topk_method: routing.method,
        norm_topk_prob: k.flag("expert_weights_norm")?.unwrap_or(false),
        routed_scaling_factor: routing.scale,
        rms_norm_eps: k.number("attention.layer_norm_rms_epsilon", 1e-30, 1.0)? as f32,
        rope_theta: k.number_if("rope.freq_base", 1.0001, 1e12)?.unwrap_or(10_000.0),
        yarn: yarn(&k, routing.experts, &mut notes)?,
        // The converter leaves the rows of Hugging Face checkpoints in their order.
        rope_interleave: true,
        max_position_embeddings: k.size("context_length", 1, POSITIONS_MAX)?,
        num_nextn_predict_layers: layers.mtp,
        tie_word_embeddings: !gguf.has("output.weight"),
        bos_token_id: k.token("tokenizer.ggml.bos_token_id", vocab_size)?,
        eos_token_ids: eos_token_ids(&k, vocab_size)?,
    };
    config.check().map_err(|(field, why)| {
        let key = KEYS.iter().find(|(name, _)| *name == field).map_or(field, |(_, key)| key);
        gguf.key_error(&full(key), why)
    })?;
    Ok(config)
}

fn check_architecture(gguf: &Gguf) -> Result<(), Error> {
    let bad = |why: String| Err(gguf.key_error(ARCHITECTURE_KEY, why));
    let Some(value) = gguf.get(ARCHITECTURE_KEY) else { return bad("missing".into()) };
    match value.as_text() {
        Some(ARCHITECTURE) => {}
        Some("deepseek32") => {
            return bad("found deepseek32: sparse attention (DeepSeek-V3.2) is not supported".into());
        }
        _ => return bad(format!("found {}, supported is {ARCHITECTURE}", value.brief())),
    }
    match gguf.get("general.type").map(Value::as_text) {
        None | Some(Some("model")) => Ok(()),
        // Adapters and importance matrices have the architecture of the model that they are for.
        Some(_) => Err(gguf.key_error("general.type", "the file is not a model".into())),
    }
}

/// What had to be guessed.
struct Notes<'a> {
    file: &'a str,
    warnings: &'a mut Vec<String>,
}

impl Notes<'_> {
    fn guessed(&mut self, key: &str, instead: &str) {
        self.warnings.push(format!("{}: {} is missing, using {instead}", self.file, full(key)));
    }
}

struct Layers {
    main: usize,
    mtp: usize,
}

impl Layers {
    /// `block_count` counts the MTP layers that the converter knew of. Files exist whose MTP layers were left out.
    fn of(k: &Keys<'_>, notes: &mut Notes<'_>) -> Result<Self, Error> {
        let count = k.size("block_count", 1, LAYERS_MAX)?;
        let mtp = k.size_if("nextn_predict_layers", 0, 64)?.unwrap_or(0);
        if mtp == 0 {
            return Ok(Self { main: count, mtp });
        }
        if mtp >= count {
            let why = format!("found {mtp} in a model of {count} layers");
            return Err(k.error("nextn_predict_layers", why));
        }
        let has = |layer: usize, part: &str| k.gguf.has(&format!("blk.{layer}.{part}.weight"));
        let main = count - mtp;
        if has(main, "nextn.eh_proj") {
            return Ok(Self { main, mtp });
        }
        let main = if has(count - 1, "attn_norm") { count } else { main };
        let file = notes.file;
        notes
            .warnings
            .push(format!("{file}: the {mtp} MTP layers that the metadata counts are not in the file"));
        Ok(Self { main, mtp: 0 })
    }
}

struct Heads {
    count: usize,
    nope: usize,
    rope: usize,
    value: usize,
}

impl Heads {
    /// Newer files describe the cache row in `key_length` and `value_length`, and the heads in the keys with `_mla`.
    fn of(k: &Keys<'_>) -> Result<Self, Error> {
        let count = k.size("attention.head_count", 1, 65_536)?;
        let rope = k.size("rope.dimension_count", 2, 65_536)?;
        let cached = k.size_if("attention.head_count_kv", 1, 65_536)?.unwrap_or(count);
        if cached != 1 && cached != count {
            let why = format!("expected 1 or attention.head_count, {count}, as MLA needs, found {cached}");
            return Err(k.error("attention.head_count_kv", why));
        }
        let of = |newer: &'static str, older: &'static str| match k.size_if(newer, 1, 131_072)? {
            Some(n) => Ok((n, newer)),
            None => Ok::<_, Error>((k.size(older, 1, 131_072)?, older)),
        };
        let (key, key_name) = of("attention.key_length_mla", "attention.key_length")?;
        let (value, value_name) = of("attention.value_length_mla", "attention.value_length")?;
        if key <= rope {
            let why = format!("expected more than rope.dimension_count, {rope}, found {key}");
            return Err(k.error(key_name, why));
        }
        if value > 65_536 {
            return Err(k.error(value_name, format!("expected a whole number 1 to 65536, found {value}")));
        }
        Ok(Self { count, nope: key - rope, rope, value })
    }
}

struct Routing {
    experts: usize,
    used: usize,
    groups: usize,
    groups_kept: usize,
    scoring: Scoring,
    method: TopkMethod,
    scale: f32,
}

/// Released models by routed experts and experts per token: groups and groups kept. For files that were made before
/// there were keys for them.
const KNOWN_GROUPS: [(usize, usize, usize, usize, &str); 6] = [
    (256, 8, 8, 4, "DeepSeek-V3"),
    (160, 6, 8, 3, "DeepSeek-V2"),
    (384, 8, 1, 1, "Kimi-K2"),
    (64, 6, 1, 1, "DeepSeek-V2-Lite and Moonlight"),
    (64, 4, 1, 1, "GLM-4.7-Flash"),
    (0, 0, 1, 1, "no experts"),
];

impl Routing {
    fn of(k: &Keys<'_>, notes: &mut Notes<'_>) -> Result<Self, Error> {
        let experts = k.size_if("expert_count", 0, EXPERTS_MAX)?.unwrap_or(0);
        let used = k.size_if("expert_used_count", 0, EXPERTS_MAX)?.unwrap_or(0);
        let biased = k.gguf.tensors().any(|t| t.name.ends_with(".exp_probs_b.bias"));
        let scoring = Self::scoring(k, biased, notes)?;
        let (groups, groups_kept) = Self::groups(k, experts, used, notes)?;
        let method = match scoring {
            // Without the bias and without groups it is the same choice; with groups the bias is asked for.
            Scoring::Sigmoid if biased || groups > 1 => TopkMethod::NoauxTc,
            Scoring::Softmax if groups > 1 => TopkMethod::GroupLimitedGreedy,
            _ => TopkMethod::Greedy,
        };
        // The converter writes 0 for none.
        let scale = k.number_if("expert_weights_scale", 0.0, 1e6)?.filter(|s| *s != 0.0).unwrap_or(1.0);
        Ok(Self { experts, used, groups, groups_kept, scoring, method, scale: scale as f32 })
    }

    fn scoring(k: &Keys<'_>, biased: bool, notes: &mut Notes<'_>) -> Result<Scoring, Error> {
        match k.size_if("expert_gating_func", 0, u64::from(u32::MAX))? {
            Some(2) => Ok(Scoring::Sigmoid),
            // V2 was there before the key was; only models that score by sigmoid have a correction bias.
            None | Some(0) if biased => {
                notes.guessed("expert_gating_func", "sigmoid, as the router has a correction bias");
                Ok(Scoring::Sigmoid)
            }
            None | Some(0 | 1) => Ok(Scoring::Softmax),
            Some(n) => Err(
                k.error("expert_gating_func", format!("found {n}, supported are 1, softmax, and 2, sigmoid"))
            ),
        }
    }

    fn groups(
        k: &Keys<'_>,
        experts: usize,
        used: usize,
        notes: &mut Notes<'_>,
    ) -> Result<(usize, usize), Error> {
        let (count, kept) = ("expert_group_count", "expert_group_used_count");
        if let Some(groups) = k.size_if(count, 0, EXPERTS_MAX)? {
            let groups = groups.max(1);
            let kept = k.size_if(kept, 0, EXPERTS_MAX)?.unwrap_or(0);
            return Ok((groups, if groups == 1 { 1 } else { kept }));
        }
        let known = KNOWN_GROUPS.iter().find(|(e, u, ..)| (*e, *u) == (experts, used));
        match known {
            Some(&(_, _, 1, ..)) => Ok((1, 1)),
            Some(&(_, _, groups, kept, model)) => {
                notes.guessed(count, &format!("{groups} groups, of which {kept} are kept, as {model} has"));
                Ok((groups, kept))
            }
            None => {
                let instead = "no groups: if the model has some, its answers will be worse";
                notes.guessed(count, instead);
                Ok((1, 1))
            }
        }
    }
}

/// `rope.scaling.*`
fn yarn(k: &Keys<'_>, experts: usize, notes: &mut Notes<'_>) -> Result<Option<Yarn>, Error> {
    match k.text_if("rope.scaling.type")? {
        Some("yarn") => {}
        None | Some("none") => return Ok(None),
        Some(other) => {
            return Err(k.error("rope.scaling.type", format!("found {other}, supported are none and yarn")));
        }
    }
    for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"] {
        if let Some(n) = k.number_if(key, -1e6, 1e6)?.filter(|n| *n != 1.0) {
            return Err(k.error(key, format!("found {n}, supported is 1")));
        }
    }
    let fast = k.number_if("rope.scaling.yarn_beta_fast", 1e-3, 1e6)?;
    let slow = k.number_if("rope.scaling.yarn_beta_slow", 1e-3, 1e6)?;
    // Kimi-K2 alone has other values than the default, and its first files have no keys for them.
    let kimi = experts == 384;
    if kimi && fast.is_none() {
        notes.guessed("rope.scaling.yarn_beta_fast", "1, as Kimi-K2 has");
    }
    let multiplier = k.number_if("rope.scaling.yarn_log_multiplier", 0.0, 1e5)?;
    if multiplier.is_none() {
        notes.guessed("rope.scaling.yarn_log_multiplier", "no scaling of the attention scores");
    }
    // The key has a tenth of mscale_all_dim; all released models have mscale equal to it.
    let mscale = multiplier.map(|m| (m * 1e10).round() / 1e9);
    Ok(Some(Yarn {
        factor: k.number("rope.scaling.factor", 1.0, 1e6)?,
        original_max_position_embeddings: k.size("rope.scaling.original_context_length", 1, POSITIONS_MAX)?
            as f64,
        beta_fast: fast.unwrap_or(if kimi { 1.0 } else { 32.0 }),
        beta_slow: slow.unwrap_or(1.0),
        mscale,
        mscale_all_dim: mscale,
        attention_factor: None,
    }))
}

/// Rows of the embedding: the key may count fewer.
fn vocab_size(k: &Keys<'_>) -> Result<usize, Error> {
    if let Some([rows, _]) = k.gguf.tensor("token_embd.weight").map(|t| t.shape)
        && *rows as u64 <= SIZE_MAX
    {
        return Ok(*rows);
    }
    k.size("vocab_size", 1, SIZE_MAX)
}

/// Tokens that end an answer beside the one that the file names: Kimi's turns end with one that not all converters
/// wrote down.
const ENDS: [&str; 1] = ["<|im_end|>"];

fn eos_token_ids(k: &Keys<'_>, vocab_size: usize) -> Result<Vec<u32>, Error> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ids.extend(k.token(key, vocab_size)?);
    }
    let tokens = k.gguf.get("tokenizer.ggml.tokens").and_then(Value::as_array).and_then(Array::as_texts);
    for (id, text) in tokens.into_iter().flatten().take(vocab_size).enumerate() {
        if ENDS.contains(&text) {
            ids.push(id as u32);
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The key of the architecture, or one that is its own.
fn full(key: &str) -> String {
    if key.starts_with("tokenizer.") { key.into() } else { format!("{ARCHITECTURE}.{key}") }
}

/// The metadata of the architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
}

impl<'a> Keys<'a> {
    fn error(&self, key: &str, why: String) -> Error {
        self.gguf.key_error(&full(key), why)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.gguf.get(&full(key))
    }

    fn need<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| self.error(key, "missing".into()))
    }

    /// A whole number in `min..=max`.
    fn size(&self, key: &str, min: u64, max: u64) -> Result<usize, Error> {
        let value = self.size_if(key, min, max)?;
        self.need(key, value)
    }

    fn size_if(&self, key: &str, min: u64, max: u64) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_i64().and_then(|n| u64::try_from(n).ok()) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n as usize)),
            _ => {
                Err(self
                    .error(key, format!("expected a whole number {min} to {max}, found {}", value.brief())))
            }
        }
    }

    fn number(&self, key: &str, min: f64, max: f64) -> Result<f64, Error> {
        let value = self.number_if(key, min, max)?;
        self.need(key, value)
    }

    fn number_if(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if n >= min && n <= max => Ok(Some(n)),
            _ => {
                let why = format!("expected a number {min:?} to {max:?}, found {}", value.brief());
                Err(self.error(key, why))
            }
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.error(key, format!("expected true or false, found {}", other.brief()))),
        }
    }

    fn text_if(&self, key: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_text() {
            Some(text) => Ok(Some(text)),
            None => Err(self.error(key, format!("expected text, found {}", value.brief()))),
        }
    }

    /// A token id in the vocabulary.
    fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>, Error> {
        Ok(self.size_if(key, 0, vocab_size as u64 - 1)?.map(|id| id as u32))
    }
}

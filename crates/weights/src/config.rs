//! `config.json`: what the model is. Every field is checked here, once.

use oxseek_tensor::backend::Scoring;
use serde_json::{Map, Value};

use crate::{Error, json};

mod compressed;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

/// Largest size of any dimension or count: far above every model, far below what could overflow.
pub(crate) const SIZE_MAX: u64 = 1 << 24;
pub(crate) const LAYERS_MAX: u64 = 1024;
pub(crate) const EXPERTS_MAX: u64 = 4096;
/// Largest of the two files. Real ones are a few kilobytes; a parsed one takes up to twenty times its bytes.
const CONFIG_BYTES_MAX: usize = 4 << 20;
pub(crate) const POSITIONS_MAX: u64 = 1 << 28;
/// Largest latent row, scratch row or weight matrix side made of two of the above.
const PRODUCT_MAX: usize = 1 << 26;

/// The values of a model of the DeepSeek family, valid by construction. Names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each field is config.json's of the same name")]
pub struct ModelConfig {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    pub intermediate_size: usize,
    pub moe_intermediate_size: usize,
    /// 0 for a model without experts.
    pub n_routed_experts: usize,
    pub n_shared_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub first_k_dense_replace: usize,
    pub moe_layer_freq: usize,
    /// For each layer, whether it has experts; replaces the two fields above where it is present.
    pub mlp_layer_types: Option<Vec<bool>>,
    /// `scoring_func`
    pub scoring: Scoring,
    pub topk_method: TopkMethod,
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f32,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub yarn: Option<Yarn>,
    pub rope_interleave: bool,
    pub max_position_embeddings: usize,
    pub num_nextn_predict_layers: usize,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Of `config.json` and `generation_config.json` together.
    pub eos_token_ids: Vec<u32>,
}

/// `topk_method`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkMethod {
    /// V2-Lite: the best experts, whatever their group.
    Greedy,
    /// V2: the best experts of the best groups.
    GroupLimitedGreedy,
    /// V3: the same with a correction bias.
    NoauxTc,
}

/// `rope_scaling` of type yarn.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each field is rope_scaling's of the same name")]
pub struct Yarn {
    pub factor: f64,
    pub original_max_position_embeddings: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
    pub attention_factor: Option<f64>,
}

impl ModelConfig {
    /// Parses and checks `config.json` and, for its end-of-text ids, `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field, or [`Error::File`] when the file is no JSON object.
    pub fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<Self, Error> {
        let object = object(CONFIG, config)?;
        let c = Fields { file: CONFIG, path: "", map: &object };
        let model_type = c.text("model_type")?.unwrap_or("none").to_string();
        if !["deepseek_v2", "deepseek_v3", "kimi_k2"].contains(&model_type.as_str()) {
            let found = format!("found {model_type}, supported are deepseek_v2, deepseek_v3 and kimi_k2");
            return Err(c.error("model_type", found));
        }
        refuse_unsupported(&c)?;
        let v2 = model_type == "deepseek_v2";
        let (rope_theta, yarn) = rope(&c)?;
        let generation = generation.map(|g| self::object(GENERATION, g)).transpose()?;
        let vocab_size = c.size("vocab_size", 1, SIZE_MAX)?;
        let mut config = Self {
            vocab_size,
            hidden_size: c.size("hidden_size", 1, SIZE_MAX)?,
            num_hidden_layers: c.size("num_hidden_layers", 1, LAYERS_MAX)?,
            num_attention_heads: c.size("num_attention_heads", 1, 65_536)?,
            q_lora_rank: Some(c.size_or("q_lora_rank", 0, 0, SIZE_MAX)?).filter(|r| *r > 0),
            kv_lora_rank: c.size("kv_lora_rank", 1, SIZE_MAX)?,
            qk_nope_head_dim: c.size("qk_nope_head_dim", 1, 65_536)?,
            qk_rope_head_dim: c.size("qk_rope_head_dim", 2, 65_536)?,
            v_head_dim: c.size("v_head_dim", 1, 65_536)?,
            intermediate_size: c.size("intermediate_size", 1, SIZE_MAX)?,
            moe_intermediate_size: c.size_or("moe_intermediate_size", 0, 0, SIZE_MAX)?,
            n_routed_experts: c.size_or("n_routed_experts", 0, 0, EXPERTS_MAX)?,
            n_shared_experts: c.size_or("n_shared_experts", 0, 0, EXPERTS_MAX)?,
            num_experts_per_tok: c.size_or("num_experts_per_tok", 0, 0, EXPERTS_MAX)?,
            n_group: c.size_or("n_group", 1, 0, EXPERTS_MAX)?.max(1),
            topk_group: c.size_or("topk_group", 0, 0, EXPERTS_MAX)?,
            first_k_dense_replace: c.size_or("first_k_dense_replace", 0, 0, LAYERS_MAX)?,
            moe_layer_freq: c.size_or("moe_layer_freq", 1, 1, LAYERS_MAX)?,
            mlp_layer_types: mlp_layer_types(&c)?,
            scoring: scoring(&c, v2)?,
            topk_method: topk_method(&c, v2)?,
            norm_topk_prob: c.flag("norm_topk_prob", !v2)?,
            routed_scaling_factor: c.number_or("routed_scaling_factor", 1.0, 1e-6, 1e6)? as f32,
            rms_norm_eps: c.number_or("rms_norm_eps", 1e-6, 1e-30, 1.0)? as f32,
            rope_theta,
            yarn,
            rope_interleave: c.flag("rope_interleave", true)?,
            max_position_embeddings: c.size("max_position_embeddings", 1, POSITIONS_MAX)?,
            num_nextn_predict_layers: if c.map.contains_key("num_nextn_predict_layers") {
                c.size_or("num_nextn_predict_layers", 0, 0, 64)?
            } else {
                c.size_or("num_mtp_layers", 0, 0, 64)?
            },
            tie_word_embeddings: c.flag("tie_word_embeddings", false)?,
            bos_token_id: c.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos_token_ids: eos_token_ids(&c, generation.as_ref(), vocab_size)?,
            model_type,
        };
        config.check_heads(&c)?;
        config.check().map_err(|(field, why)| c.error(field, why))?;
        // No groups, or the whole of the only one.
        config.topk_group = config.topk_group.max(1);
        Ok(config)
    }

    /// Whether main layer `i` has routed experts.
    pub fn is_moe_layer(&self, i: usize) -> bool {
        if self.n_routed_experts == 0 {
            return false;
        }
        match &self.mlp_layer_types {
            Some(sparse) => sparse.get(i).copied().unwrap_or(false),
            None => i >= self.first_k_dense_replace && i.is_multiple_of(self.moe_layer_freq),
        }
    }

    /// Sizes that other fields repeat.
    fn check_heads(&self, c: &Fields<'_>) -> Result<(), Error> {
        let heads = self.num_attention_heads;
        let found = c.size_or("num_key_value_heads", heads as u64, 1, 65_536)?;
        if found != heads {
            let why = format!("expected num_attention_heads, {heads}, as MLA needs, found {found}");
            return Err(c.error("num_key_value_heads", why));
        }
        let query = self.qk_nope_head_dim + self.qk_rope_head_dim;
        let found = c.size_or("qk_head_dim", query as u64, 1, SIZE_MAX)?;
        if found != query {
            let why = format!("expected {query}, qk_nope_head_dim + qk_rope_head_dim, found {found}");
            return Err(c.error("qk_head_dim", why));
        }
        Ok(())
    }

    /// Whether the values fit together; else the field, as config.json calls it, and why not.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        self.check_attention()?;
        self.check_experts()
    }

    fn check_attention(&self) -> Result<(), (&'static str, String)> {
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            let why = format!("found {}, expected an even number", self.qk_rope_head_dim);
            return Err(("qk_rope_head_dim", why));
        }
        let heads = self.num_attention_heads;
        let query = self.qk_nope_head_dim + self.qk_rope_head_dim;
        let widest = heads.saturating_mul(query.max(self.qk_nope_head_dim + self.v_head_dim));
        if widest > PRODUCT_MAX {
            let why =
                format!("{heads} heads make rows of {widest} values, at most {PRODUCT_MAX} are allowed");
            return Err(("num_attention_heads", why));
        }
        Ok(())
    }

    fn check_experts(&self) -> Result<(), (&'static str, String)> {
        let sparse = self.mlp_layer_types.as_ref();
        if let Some(types) = sparse.filter(|t| t.len() < self.num_hidden_layers) {
            let why = format!(
                "expected num_hidden_layers, {}, entries, found {}",
                self.num_hidden_layers,
                types.len()
            );
            return Err(("mlp_layer_types", why));
        }
        let experts = self.n_routed_experts;
        if experts == 0 {
            return match self.num_nextn_predict_layers {
                0 => Ok(()),
                _ => Err(("n_routed_experts", "an MTP layer has experts, found none".into())),
            };
        }
        let need = |field: &'static str, n: usize| match n {
            0 => Err((field, "missing or 0 in a model with routed experts".into())),
            _ => Ok(()),
        };
        need("moe_intermediate_size", self.moe_intermediate_size)?;
        need("num_experts_per_tok", self.num_experts_per_tok)?;
        let limited = self.topk_method != TopkMethod::Greedy;
        if limited && self.n_group > 1 && self.topk_group == 0 {
            let why = format!("missing or 0 in a model with {} groups of experts", self.n_group);
            return Err(("topk_group", why));
        }
        if !experts.is_multiple_of(self.n_group) {
            return Err(("n_group", format!("{} groups do not divide {experts} experts", self.n_group)));
        }
        if self.n_group > 1 && experts / self.n_group < 2 {
            return Err(("n_group", format!("{} groups of one expert each", self.n_group)));
        }
        if self.topk_group > self.n_group {
            let why = format!("expected at most n_group, {}, found {}", self.n_group, self.topk_group);
            return Err(("topk_group", why));
        }
        let kept = if limited { experts / self.n_group * self.topk_group.max(1) } else { experts };
        if self.num_experts_per_tok > kept {
            let found = self.num_experts_per_tok;
            let why = format!("expected at most the {kept} experts there are to choose from, found {found}");
            return Err(("num_experts_per_tok", why));
        }
        if self.n_shared_experts.saturating_mul(self.moe_intermediate_size) > PRODUCT_MAX {
            let why = format!("the shared experts are too wide: at most {PRODUCT_MAX} values are allowed");
            return Err(("n_shared_experts", why));
        }
        Ok(())
    }
}

/// Fields that change what the model computes in a way that is not supported.
fn refuse_unsupported(c: &Fields<'_>) -> Result<(), Error> {
    if c.get("index_topk").is_some() {
        return Err(c.error("index_topk", "sparse attention (DeepSeek-V3.2) is not supported".into()));
    }
    if let Some(act) = c.text("hidden_act")?.filter(|a| *a != "silu") {
        return Err(c.error("hidden_act", format!("found {act}, supported is silu")));
    }
    for field in ["attention_bias", "mlp_bias"] {
        if c.flag(field, false)? {
            return Err(c.error(field, "found true, supported is false".into()));
        }
    }
    let Some(q) = c.object("quantization_config")? else { return Ok(()) };
    match q.text("quant_method")? {
        Some("fp8") => {}
        Some("compressed-tensors") => return compressed::check(&q),
        Some(other) => {
            let why = format!("found {other}, supported are fp8 and compressed-tensors");
            return Err(q.error("quant_method", why));
        }
        // Weights quantised in an unknown way must not pass for plain ones.
        None => {
            return Err(q.error("quant_method", "missing, supported are fp8 and compressed-tensors".into()));
        }
    }
    if let Some(format) = q.text("fmt")?.filter(|f| *f != "e4m3") {
        return Err(q.error("fmt", format!("found {format}, supported is e4m3")));
    }
    match q.get("weight_block_size") {
        None => Ok(()),
        Some(Value::Array(b)) if b.len() == 2 && b.iter().all(|n| n.as_u64() == Some(128)) => Ok(()),
        Some(other) => {
            Err(q.error("weight_block_size", format!("found {}, supported is [128, 128]", brief(other))))
        }
    }
}

/// `rope_theta` and YaRN, from `rope_scaling` (older files) or `rope_parameters` (transformers 5).
fn rope(c: &Fields<'_>) -> Result<(f64, Option<Yarn>), Error> {
    let parameters = c.object("rope_parameters")?;
    let theta_of = |f: &Fields<'_>| f.number_or("rope_theta", 10_000.0, 1.0001, 1e12);
    let theta = match &parameters {
        Some(p) if p.get("rope_theta").is_some() => theta_of(p)?,
        _ => theta_of(c)?,
    };
    let Some(s) = c.object("rope_scaling")?.or(parameters) else { return Ok((theta, None)) };
    // Both names are in use; some files have both.
    let (kind, old_kind) = (s.text("rope_type")?, s.text("type")?);
    if let (Some(new), Some(old)) = (kind, old_kind)
        && new != old
    {
        return Err(s.error("rope_type", format!("found {new}, but type says {old}")));
    }
    let kind = kind.or(old_kind).unwrap_or("default");
    match kind {
        "default" => return Ok((theta, None)),
        "yarn" => {}
        other => return Err(s.error("rope_type", format!("found {other}, supported are default and yarn"))),
    }
    let optional = |field: &str| -> Result<Option<f64>, Error> {
        s.get(field).map(|_| s.number_or(field, 0.0, 0.0, 1e6)).transpose()
    };
    if s.get("factor").is_none() {
        return Err(s.error("factor", "missing".into()));
    }
    let yarn = Yarn {
        factor: s.number_or("factor", 1.0, 1.0, 1e6)?,
        original_max_position_embeddings: s.size("original_max_position_embeddings", 1, POSITIONS_MAX)?
            as f64,
        beta_fast: s.number_or("beta_fast", 32.0, 1e-3, 1e6)?,
        beta_slow: s.number_or("beta_slow", 1.0, 1e-3, 1e6)?,
        mscale: optional("mscale")?,
        mscale_all_dim: optional("mscale_all_dim")?,
        attention_factor: optional("attention_factor")?,
    };
    Ok((theta, Some(yarn)))
}

fn scoring(c: &Fields<'_>, v2: bool) -> Result<Scoring, Error> {
    match c.text("scoring_func")? {
        None => Ok(if v2 { Scoring::Softmax } else { Scoring::Sigmoid }),
        Some("softmax") => Ok(Scoring::Softmax),
        Some("sigmoid") => Ok(Scoring::Sigmoid),
        Some(other) => {
            Err(c.error("scoring_func", format!("found {other}, supported are softmax and sigmoid")))
        }
    }
}

fn topk_method(c: &Fields<'_>, v2: bool) -> Result<TopkMethod, Error> {
    match c.text("topk_method")? {
        None => Ok(if v2 { TopkMethod::Greedy } else { TopkMethod::NoauxTc }),
        Some("greedy") => Ok(TopkMethod::Greedy),
        Some("group_limited_greedy") => Ok(TopkMethod::GroupLimitedGreedy),
        Some("noaux_tc") => Ok(TopkMethod::NoauxTc),
        Some(other) => {
            let why = format!("found {other}, supported are greedy, group_limited_greedy and noaux_tc");
            Err(c.error("topk_method", why))
        }
    }
}

fn mlp_layer_types(c: &Fields<'_>) -> Result<Option<Vec<bool>>, Error> {
    let Some(value) = c.get("mlp_layer_types") else { return Ok(None) };
    let bad = |found: &Value| {
        let why = format!("expected a list of \"dense\" and \"sparse\", found {}", brief(found));
        c.error("mlp_layer_types", why)
    };
    let kind = |v: &Value| match v.as_str() {
        Some("dense") => Ok(false),
        Some("sparse") => Ok(true),
        _ => Err(bad(v)),
    };
    value.as_array().ok_or_else(|| bad(value))?.iter().map(kind).collect::<Result<_, _>>().map(Some)
}

fn eos_token_ids(
    c: &Fields<'_>,
    generation: Option<&Map<String, Value>>,
    vocab_size: usize,
) -> Result<Vec<u32>, Error> {
    let mut ids = c.token_ids("eos_token_id", vocab_size)?;
    if let Some(map) = generation {
        ids.extend(Fields { file: GENERATION, path: "", map }.token_ids("eos_token_id", vocab_size)?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    let bad = |why: String| Error::File { file: file.into(), why };
    if bytes.len() > CONFIG_BYTES_MAX {
        return Err(bad(format!("{} bytes, at most {CONFIG_BYTES_MAX} allowed", bytes.len())));
    }
    match json::parse(bytes).map_err(|e| bad(format!("not JSON: {e}")))? {
        Value::Object(map) => Ok(map),
        other => Err(bad(format!("expected a JSON object, found {}", brief(&other)))),
    }
}

/// The fields of a JSON object; null counts as absent.
struct Fields<'a> {
    file: &'static str,
    path: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn error(&self, field: &str, why: String) -> Error {
        Error::Config { file: self.file, field: format!("{}{field}", self.path), why }
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    fn object(&self, field: &'static str) -> Result<Option<Fields<'a>>, Error> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                file: self.file,
                path: match field {
                    "rope_scaling" => "rope_scaling.",
                    "rope_parameters" => "rope_parameters.",
                    _ => "quantization_config.",
                },
                map,
            })),
            Some(other) => Err(self.error(field, format!("expected an object, found {}", brief(other)))),
        }
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>, Error> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.error(field, format!("expected text, found {}", brief(other)))),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(field, format!("expected true or false, found {}", brief(other)))),
        }
    }

    /// A required whole number in `min..=max`.
    fn size(&self, field: &str, min: u64, max: u64) -> Result<usize, Error> {
        match self.get(field) {
            None => Err(self.error(field, "missing".into())),
            Some(_) => self.size_or(field, min, min, max),
        }
    }

    fn size_or(&self, field: &str, default: u64, min: u64, max: u64) -> Result<usize, Error> {
        let Some(value) = self.get(field) else { return Ok(default as usize) };
        match value.as_u64() {
            Some(n) if (min..=max).contains(&n) => Ok(n as usize),
            _ => {
                Err(self
                    .error(field, format!("expected a whole number {min} to {max}, found {}", brief(value))))
            }
        }
    }

    fn number_or(&self, field: &str, default: f64, min: f64, max: f64) -> Result<f64, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        match value.as_f64() {
            Some(n) if n >= min && n <= max => Ok(n),
            _ => {
                Err(self
                    .error(field, format!("expected a number {min:?} to {max:?}, found {}", brief(value))))
            }
        }
    }

    /// One token id or a list of them, each in the vocabulary.
    fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Vec<u32>, Error> {
        let id = |v: &Value| match v.as_u64() {
            Some(n) if n < vocab_size as u64 => Ok(n as u32),
            _ => Err(self.error(field, format!("expected token ids below {vocab_size}, found {}", brief(v)))),
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(one) => Ok(vec![id(one)?]),
        }
    }
}

/// A value for an error message, cut short.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

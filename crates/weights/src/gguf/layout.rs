//! The tensors of a GGUF file of a model: what each is called, its shape and what it is made of.

use crate::ModelConfig;

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is made of.
    pub source: Source,
}

/// What a tensor is made of, by the names of Hugging Face checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A vector.
    Vector(String),
    /// A matrix.
    Matrix(String),
    /// One matrix per expert; `kind` is gate, up or down.
    Experts {
        /// The layer.
        layer: usize,
        /// gate, up or down.
        kind: &'static str,
    },
    /// The key rows of a layer's `kv_b_proj`, transposed head by head.
    LatentKeys {
        /// The layer.
        layer: usize,
    },
    /// The value rows of a layer's `kv_b_proj`.
    LatentValues {
        /// The layer.
        layer: usize,
    },
}

impl Slot {
    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows, over all outer sizes.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }
}

/// All tensors of a model, MTP layers included, as newer files have them: `kv_b_proj` in two parts.
///
/// The copies of the embedding and of the head that MTP layers have are left out: readers take the model's own.
pub fn layout(config: &ModelConfig) -> Vec<Slot> {
    let mut all = Layout { slots: Vec::new() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    all.matrix("token_embd.weight", "model.embed_tokens.weight", vocab, hidden);
    for layer in 0..config.num_hidden_layers + config.num_nextn_predict_layers {
        all.attention(config, layer);
        if layer >= config.num_hidden_layers || config.is_moe_layer(layer) {
            all.experts(config, layer);
        } else {
            all.feed_forward(layer, ("", "mlp"), config.intermediate_size, hidden);
        }
        if layer >= config.num_hidden_layers {
            all.next_token(layer, hidden);
        }
    }
    all.vector("output_norm.weight", "model.norm.weight", hidden);
    if !config.tie_word_embeddings {
        all.matrix("output.weight", "lm_head.weight", vocab, hidden);
    }
    all.slots
}

struct Layout {
    slots: Vec<Slot>,
}

impl Layout {
    fn push(&mut self, name: String, shape: Vec<usize>, source: Source) {
        self.slots.push(Slot { name, shape, source });
    }

    fn vector(&mut self, name: &str, model: &str, len: usize) {
        self.push(name.into(), vec![len], Source::Vector(model.into()));
    }

    fn matrix(&mut self, name: &str, model: &str, rows: usize, cols: usize) {
        self.push(name.into(), vec![rows, cols], Source::Matrix(model.into()));
    }

    /// Norms too.
    fn attention(&mut self, c: &ModelConfig, layer: usize) {
        let (hidden, latent, heads) = (c.hidden_size, c.kv_lora_rank, c.num_attention_heads);
        let (key, rope, value) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
        let file = |part: &str| format!("blk.{layer}.{part}.weight");
        let model = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let queries = heads * (key + rope);
        self.vector(&file("attn_norm"), &model("input_layernorm"), hidden);
        if let Some(rank) = c.q_lora_rank {
            self.matrix(&file("attn_q_a"), &model("self_attn.q_a_proj"), rank, hidden);
            self.vector(&file("attn_q_a_norm"), &model("self_attn.q_a_layernorm"), rank);
            self.matrix(&file("attn_q_b"), &model("self_attn.q_b_proj"), queries, rank);
        } else {
            self.matrix(&file("attn_q"), &model("self_attn.q_proj"), queries, hidden);
        }
        self.matrix(&file("attn_kv_a_mqa"), &model("self_attn.kv_a_proj_with_mqa"), latent + rope, hidden);
        self.vector(&file("attn_kv_a_norm"), &model("self_attn.kv_a_layernorm"), latent);
        self.push(file("attn_k_b"), vec![heads, latent, key], Source::LatentKeys { layer });
        self.push(file("attn_v_b"), vec![heads, value, latent], Source::LatentValues { layer });
        self.matrix(&file("attn_output"), &model("self_attn.o_proj"), hidden, heads * value);
        self.vector(&file("ffn_norm"), &model("post_attention_layernorm"), hidden);
    }

    fn experts(&mut self, c: &ModelConfig, layer: usize) {
        let (hidden, experts, inner) = (c.hidden_size, c.n_routed_experts, c.moe_intermediate_size);
        let router = format!("model.layers.{layer}.mlp.gate");
        self.matrix(
            &format!("blk.{layer}.ffn_gate_inp.weight"),
            &format!("{router}.weight"),
            experts,
            hidden,
        );
        if c.topk_method == crate::TopkMethod::NoauxTc {
            let bias = format!("{router}.e_score_correction_bias");
            self.vector(&format!("blk.{layer}.exp_probs_b.bias"), &bias, experts);
        }
        for (kind, rows, cols) in [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)] {
            let name = format!("blk.{layer}.ffn_{kind}_exps.weight");
            self.push(name, vec![experts, rows, cols], Source::Experts { layer, kind });
        }
        if c.n_shared_experts > 0 {
            self.feed_forward(layer, ("_shexp", "mlp.shared_experts"), c.n_shared_experts * inner, hidden);
        }
    }

    fn feed_forward(&mut self, layer: usize, (suffix, module): (&str, &str), inner: usize, hidden: usize) {
        for (kind, rows, cols) in [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)] {
            let model = format!("model.layers.{layer}.{module}.{kind}_proj.weight");
            self.matrix(&format!("blk.{layer}.ffn_{kind}{suffix}.weight"), &model, rows, cols);
        }
    }

    /// What an MTP layer has beside a decoder layer.
    fn next_token(&mut self, layer: usize, hidden: usize) {
        let file = |part: &str| format!("blk.{layer}.nextn.{part}.weight");
        let model = |part: &str| format!("model.layers.{layer}.{part}.weight");
        self.matrix(&file("eh_proj"), &model("eh_proj"), hidden, 2 * hidden);
        self.vector(&file("enorm"), &model("enorm"), hidden);
        self.vector(&file("hnorm"), &model("hnorm"), hidden);
        self.vector(&file("shared_head_norm"), &model("shared_head.norm"), hidden);
    }
}

//! What a GGUF file calls what a Hugging Face checkpoint calls otherwise.

/// Where a tensor of a Hugging Face checkpoint is in a GGUF file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place<'a> {
    /// The same under another name.
    Whole(String),
    /// One of a stack of experts; `kind` is gate, up or down.
    Expert { layer: &'a str, kind: &'a str, expert: usize },
    /// `kv_b_proj`, which newer files keep in two parts.
    Latent { layer: &'a str },
}

/// Tensors that belong to no layer.
const MODEL: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Tensors of a layer, MTP layers included.
const LAYER: [(&str, &str); 26] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
    ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
    ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
    ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
    (KV_B, "attn_kv_b.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("mlp.gate.weight", "ffn_gate_inp.weight"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"),
    ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
    ("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight"),
    ("enorm.weight", "nextn.enorm.weight"),
    ("hnorm.weight", "nextn.hnorm.weight"),
    ("eh_proj.weight", "nextn.eh_proj.weight"),
    ("shared_head.norm.weight", "nextn.shared_head_norm.weight"),
    ("shared_head.head.weight", "nextn.shared_head_head.weight"),
    ("embed_tokens.weight", "nextn.embed_tokens.weight"),
    // In two parts, with names of our own: there are none in Hugging Face checkpoints.
    ("self_attn.k_b_proj.weight", "attn_k_b.weight"),
    ("self_attn.v_b_proj.weight", "attn_v_b.weight"),
];

const KV_B: &str = "self_attn.kv_b_proj.weight";

/// Where the tensor is that a Hugging Face checkpoint calls `name`. A name that is in no table stays as it is: the
/// file will not have it, and the error names it.
pub(super) fn place(name: &str) -> Place<'_> {
    if let Some((_, file)) = MODEL.iter().find(|(model, _)| *model == name) {
        return Place::Whole((*file).into());
    }
    let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')) else {
        return Place::Whole(name.into());
    };
    if part == KV_B {
        return Place::Latent { layer };
    }
    if let Some(expert) = part.strip_prefix("mlp.experts.").and_then(|p| expert(layer, p)) {
        return expert;
    }
    let file = LAYER.iter().find(|(model, _)| *model == part).map(|(_, file)| *file);
    Place::Whole(file.map_or_else(|| name.into(), |file| format!("blk.{layer}.{file}")))
}

/// `12.gate_proj.weight`
fn expert<'a>(layer: &'a str, part: &'a str) -> Option<Place<'a>> {
    let (expert, part) = part.split_once('.')?;
    let kind = part.strip_suffix("_proj.weight")?;
    Some(Place::Expert { layer, kind, expert: expert.parse().ok()? })
}

/// The name that a tensor of a file has in a Hugging Face checkpoint; stacks of experts have the one of an expert less
/// its number. `None` for a tensor that the model has not.
pub(super) fn model_name(name: &str) -> Option<String> {
    if let Some((model, _)) = MODEL.iter().find(|(_, file)| *file == name) {
        return Some((*model).into());
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    if let Some(kind) = part.strip_prefix("ffn_").and_then(|p| p.strip_suffix("_exps.weight")) {
        return Some(format!("model.layers.{layer}.mlp.experts.{kind}_proj.weight"));
    }
    let (model, _) = LAYER.iter().find(|(_, file)| *file == part)?;
    Some(format!("model.layers.{layer}.{model}"))
}

/// The stack of all experts' matrices of a kind.
pub(super) fn stack(layer: &str, kind: &str) -> String {
    format!("blk.{layer}.ffn_{kind}_exps.weight")
}

/// The stack of all experts' gates and ups, each gate before its up.
pub(super) fn fused_stack(layer: &str) -> String {
    stack(layer, "gate_up")
}

/// `kv_b_proj` as older files have it: as it is.
pub(super) fn kv_b(layer: &str) -> String {
    format!("blk.{layer}.attn_kv_b.weight")
}

/// Its key rows, transposed head by head.
pub(super) fn k_b(layer: &str) -> String {
    format!("blk.{layer}.attn_k_b.weight")
}

/// Its value rows, head by head.
pub(super) fn v_b(layer: &str) -> String {
    format!("blk.{layer}.attn_v_b.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found() {
        let whole = |name: &str| Place::Whole(name.into());
        assert_eq!(place("lm_head.weight"), whole("output.weight"));
        assert_eq!(place("model.layers.7.self_attn.q_b_proj.weight"), whole("blk.7.attn_q_b.weight"));
        assert_eq!(place("model.layers.61.eh_proj.weight"), whole("blk.61.nextn.eh_proj.weight"));
        assert_eq!(place("model.layers.3.self_attn.kv_b_proj.weight"), Place::Latent { layer: "3" });
        let up = Place::Expert { layer: "3", kind: "up", expert: 255 };
        assert_eq!(place("model.layers.3.mlp.experts.255.up_proj.weight"), up);
        assert_eq!(place("model.layers.3.mlp.other"), whole("model.layers.3.mlp.other"));
        assert_eq!(place("other"), whole("other"));
    }

    #[test]
    fn names_go_there_and_back() {
        for (model, file) in LAYER {
            let (model, file) = (format!("model.layers.5.{model}"), format!("blk.5.{file}"));
            assert_eq!(model_name(&file).as_ref(), Some(&model));
            if !model.ends_with(KV_B) {
                assert_eq!(place(&model), Place::Whole(file));
            }
        }
        let stack = model_name("blk.5.ffn_down_exps.weight");
        assert_eq!(stack.as_deref(), Some("model.layers.5.mlp.experts.down_proj.weight"));
        assert_eq!(model_name("rope_freqs.weight"), None);
    }
}

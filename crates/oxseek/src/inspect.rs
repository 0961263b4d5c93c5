//! `oxseek inspect`: what a checkpoint is, from its headers alone.

use std::io::Write;

use oxseek_backend_cpu::Precision;
use oxseek_model::Footprint;
use oxseek_tensor::{CacheFormat, backend::Scoring};
use oxseek_weights::{Checkpoint, ModelConfig, TopkMethod};

use crate::{
    args::InspectArgs,
    failure::Failure,
    open::{CONTEXT_TOKENS_DEFAULT, load_options, open_checkpoint},
    plan::need::{Experts, Need},
};

/// Prints architecture, parameters, bytes per format, bytes read per token, cache bytes per token and what stays in
/// memory.
pub fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let (name, checkpoint) = open_checkpoint(args.model.as_deref())?;
    let mut out = std::io::stdout().lock();
    let footprint = Footprint::of(&checkpoint, CacheFormat::Bf16);
    let context = checkpoint.config().max_position_embeddings.min(CONTEXT_TOKENS_DEFAULT);
    let options = load_options(context, 1, CacheFormat::Bf16);
    let need = Need::of(&checkpoint, &options, Precision::Native, 1);
    let mut lines = architecture(&name, checkpoint.config());
    lines.extend(sizes(&footprint));
    lines.extend(resident(&need, context));
    for (label, value) in lines {
        writeln!(out, "{label:<22} {value}")?;
    }
    if args.tensors {
        list_tensors(&mut out, &checkpoint)?;
    }
    Ok(())
}

type Line = (&'static str, String);

fn architecture(name: &str, c: &ModelConfig) -> Vec<Line> {
    let query = c.q_lora_rank.map_or("full".into(), |r| format!("low rank {r}"));
    let mut lines = vec![
        ("model", name.to_string()),
        ("architecture", c.model_type.clone()),
        ("layers", format!("{} + {} MTP", c.num_hidden_layers, c.num_nextn_predict_layers)),
        ("hidden size", c.hidden_size.to_string()),
        (
            "attention",
            format!(
                "MLA, {} heads of {}+{} (nope+rope), value {}, query {query}, latent {}",
                c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
            ),
        ),
    ];
    if c.n_routed_experts > 0 {
        let scoring = match c.scoring {
            Scoring::Softmax => "softmax",
            Scoring::Sigmoid => "sigmoid",
        };
        let method = match c.topk_method {
            TopkMethod::Greedy => "greedy",
            TopkMethod::GroupLimitedGreedy => "group_limited_greedy",
            TopkMethod::NoauxTc => "noaux_tc",
        };
        lines.push((
            "experts",
            format!(
                "{} routed of width {}, {} per token, {} shared",
                c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok, c.n_shared_experts
            ),
        ));
        lines.push((
            "routing",
            format!(
                "{scoring}, {method}, {} of {} groups, scale {}",
                c.topk_group, c.n_group, c.routed_scaling_factor
            ),
        ));
    }
    let rope = match &c.yarn {
        Some(y) => format!(
            "theta {}, YaRN factor {} over {}",
            c.rope_theta, y.factor, y.original_max_position_embeddings
        ),
        None => format!("theta {}", c.rope_theta),
    };
    lines.push(("rope", rope));
    lines.push(("context", format!("{} tokens", c.max_position_embeddings)));
    lines.push(("vocabulary", c.vocab_size.to_string()));
    lines
}

fn sizes(f: &Footprint) -> Vec<Line> {
    let mut lines = vec![
        ("parameters", format!("{} + {} MTP", count(f.parameters), count(f.mtp_parameters))),
        ("active per token", count(f.active_parameters)),
    ];
    for (format, bytes) in &f.bytes_by_format {
        lines.push(("weights", format!("{:<8} {}", format, size(*bytes))));
    }
    lines.push(("weights in all", size(f.bytes_by_format.values().sum())));
    lines.push(("read per token", size(f.bytes_per_token)));
    lines.push(("cache per token", format!("{} in BF16", size(f.cache_bytes_per_token))));
    lines
}

/// What stays in memory, from `oxseek plan`'s own figures.
fn resident(n: &Need, context: usize) -> Vec<Line> {
    let all = size(n.resident(Experts::Ram));
    let mut lines = vec![("in memory", format!("{all} with one answer of {context} tokens"))];
    if n.has_experts() {
        let rest = size(n.resident(Experts::Disk));
        lines.push(("", format!("{rest} with experts on disk")));
    }
    if n.made > 0 {
        lines.push((
            "",
            format!("{} of it made at load, because no kernel takes what the file has", size(n.made)),
        ));
    }
    lines
}

fn list_tensors(out: &mut impl Write, checkpoint: &Checkpoint) -> Result<(), Failure> {
    writeln!(out)?;
    for t in checkpoint.tensors() {
        writeln!(out, "{:<72} {:<8} {:?} {}", t.name, t.dtype, t.shape, size(t.bytes as u64))?;
    }
    Ok(())
}

/// `26.15 M`
pub fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// `29.65 MB`, in powers of ten as disks and bandwidths are.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.2} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_at_powers_of_a_thousand() {
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1_000), "1.00 kB");
        assert_eq!(size(29_654_321), "29.65 MB");
        assert_eq!(count(26_150_000), "26.15 M");
    }
}

//! Tiny checkpoints against the answers of Hugging Face transformers.

use std::{fmt, path::Path};

use oxseek_model::{Batch, DeepSeek, LanguageModel, LoadOptions, LogitRows};
use oxseek_tensor::CacheFormat;

use crate::{
    Error, MakeBackend,
    golden::{Golden, open_checkpoint},
    sequence::{Sequence, argmax, forward, max_abs_difference},
};

/// The fixture folders, as they lie in `goldens/`.
pub const NAMES: [&str; 6] = [
    "v2lite_softmax_greedy_noq",
    "v2_group_limited",
    "v3_sigmoid_groups_yarn_mtp",
    "moonlight_like",
    "v3_al128_fp8",
    "v3_al128_fp8_ue8m0",
];

/// Tokens of `input_ids` that the golden greedy text continues.
const GREEDY_PROMPT_TOKENS: usize = 20;

/// What one fixture gave. Differences are largest absolute ones.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Folder name.
    pub name: String,
    /// One-shot prefill against the golden logits.
    pub logits: f64,
    /// What is allowed for it: 5e-5 for F32 mathematics, 1e-4 for FP8 checkpoints.
    pub logits_bound: f64,
    /// Router sets that differ, over all MoE layers and tokens.
    pub router_sets_wrong: usize,
    /// Router sets compared; 0 where the golden has none (the FP8 fixtures).
    pub router_sets: usize,
    /// Router weights against the golden ones.
    pub router_weights: f64,
    /// Golden greedy ids reproduced before the first difference.
    pub greedy: usize,
    /// Golden greedy ids; 0 where the golden has none.
    pub greedy_of: usize,
    /// Prompt chunks 7 + 13 + 12 + 16 against one shot; 0 when bit-equal.
    pub chunked: f64,
    /// Token by token, as prompt tokens, against one shot; 0 when bit-equal.
    pub single: f64,
    /// Token by token through absorbed attention, as decoding does it, against the golden logits.
    pub absorbed: f64,
    /// Sequences of mixed lengths in one batch against each alone; 0 when bit-equal.
    pub batched: f64,
    /// MTP logits against the golden ones, where there is an MTP layer.
    pub mtp: Option<f64>,
}

impl Figures {
    /// Whether every figure is within its bound.
    pub fn passed(&self) -> bool {
        self.logits <= self.logits_bound
            && self.router_sets_wrong == 0
            && self.router_weights <= 1e-4
            && self.greedy == self.greedy_of
            && self.chunked == 0.0
            && self.single == 0.0
            && self.absorbed <= self.logits_bound
            && self.batched == 0.0
            && self.mtp.is_none_or(|d| d <= 5e-5)
    }

    /// The heading of the table that [`Figures`] prints a row of.
    pub const HEADING: &str = "fixture                      logits   bound  router sets  weights  greedy  \
        chunked   single  absorbed  batched      mtp";
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<27} {:>7.1e} {:>7.0e} {:>8}/{:<3} {:>8.1e} {:>4}/{:<2} {:>8.1e} {:>8.1e} {:>9.1e} {:>8.1e} ",
            self.name,
            self.logits,
            self.logits_bound,
            self.router_sets - self.router_sets_wrong,
            self.router_sets,
            self.router_weights,
            self.greedy,
            self.greedy_of,
            self.chunked,
            self.single,
            self.absorbed,
            self.batched,
        )?;
        match self.mtp {
            Some(d) => write!(f, "{d:>8.1e}"),
            None => write!(f, "{:>8}", "-"),
        }
    }
}

/// Runs every check of one fixture folder on backends from `make`.
///
/// # Errors
/// [`Error`] when the check itself cannot be made.
pub fn check(folder: &Path, make: &mut MakeBackend<'_>) -> Result<Figures, Error> {
    let checkpoint = open_checkpoint(folder)?;
    let golden = Golden::open(&folder.join("golden.safetensors.gz"))?;
    let options = LoadOptions {
        context_tokens_max: 512,
        cache_blocks: 16,
        step_rows_max: 192,
        logit_rows_max: 192,
        cache_format: CacheFormat::F32,
    };
    let mut model = DeepSeek::load(&checkpoint, make()?, options, &mut |_, _| {})?;
    let fp8 = checkpoint.tensors().any(|t| t.dtype == "F8_E4M3");
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let ids = golden.ids("input_ids")?;
    let expected = golden.floats("logits")?;

    let one_shot = Sequence::new(ids.len(), ids.len(), 3).run(&mut model, &ids, LogitRows::All)?;
    let mtp = mtp_difference(&mut model, &golden, &ids)?;
    let (router_sets, router_sets_wrong, router_weights) = router_differences(&mut model, &golden, &ids)?;
    let single: Vec<usize> = (0..=ids.len()).collect();
    let chunked = in_chunks(&mut model, &ids, &[0, 7, 20, 32, 48], ids.len())?;
    let one_by_one = in_chunks(&mut model, &ids, &single, ids.len())?;
    let absorbed = in_chunks(&mut model, &ids, &single, 0)?;
    let (greedy, greedy_of) = greedy_agreement(&mut model, &golden, &ids)?;
    Ok(Figures {
        name,
        logits: max_abs_difference(&one_shot, &expected),
        logits_bound: if fp8 { 1e-4 } else { 5e-5 },
        router_sets_wrong,
        router_sets,
        router_weights,
        greedy,
        greedy_of,
        chunked: max_abs_difference(&chunked, &one_shot),
        single: max_abs_difference(&one_by_one, &one_shot),
        absorbed: max_abs_difference(&absorbed, &expected),
        batched: batch_difference(&mut model, &ids)?,
        mtp,
    })
}

/// All logits of `ids` run in chunks between the `cuts`.
fn in_chunks(
    model: &mut DeepSeek,
    ids: &[u32],
    cuts: &[usize],
    prompt_tokens: usize,
) -> Result<Vec<f32>, Error> {
    let mut sequence = Sequence::new(prompt_tokens, ids.len(), 5);
    let mut all = Vec::new();
    for cut in cuts.windows(2) {
        all.extend(sequence.run(model, &ids[cut[0]..cut[1]], LogitRows::All)?);
    }
    Ok(all)
}

fn greedy_agreement(model: &mut DeepSeek, golden: &Golden, ids: &[u32]) -> Result<(usize, usize), Error> {
    if !golden.contains("greedy") {
        return Ok((0, 0));
    }
    let expected = golden.ids("greedy")?;
    let prompt = &ids[..GREEDY_PROMPT_TOKENS];
    let mut sequence = Sequence::new(prompt.len(), prompt.len() + expected.len(), 0);
    let mut token = argmax(&sequence.run(model, prompt, LogitRows::Last)?);
    let mut same = 0;
    for e in &expected {
        if token != *e {
            break;
        }
        same += 1;
        token = argmax(&sequence.run(model, &[token], LogitRows::Last)?);
    }
    Ok((same, expected.len()))
}

fn router_differences(
    model: &mut DeepSeek,
    golden: &Golden,
    ids: &[u32],
) -> Result<(usize, usize, f64), Error> {
    let mut batch = Batch::default();
    Sequence::new(ids.len(), ids.len(), 2).push(&mut batch, ids, LogitRows::None);
    let mut layers = Vec::new();
    model.trace_routing(&batch, &mut |layer, ids, weights| layers.push((layer, ids, weights)))?;
    let (mut sets, mut wrong, mut worst) = (0, 0, 0.0f64);
    for (layer, found, weights) in layers {
        if !golden.contains(&format!("router_idx.{layer}")) {
            continue;
        }
        let expected = golden.ids(&format!("router_idx.{layer}"))?;
        let expected_weights = golden.floats(&format!("router_w.{layer}"))?;
        let k = found.len() / ids.len();
        for row in 0..ids.len() {
            let slots = row * k..(row + 1) * k;
            let mut pairs: Vec<(u32, f32)> =
                found[slots.clone()].iter().copied().zip(weights[slots.clone()].iter().copied()).collect();
            pairs.sort_by_key(|p| p.0);
            sets += 1;
            if pairs.iter().map(|p| p.0).ne(expected[slots.clone()].iter().copied()) {
                wrong += 1;
                continue;
            }
            let weights: Vec<f32> = pairs.iter().map(|p| p.1).collect();
            worst = worst.max(max_abs_difference(&weights, &expected_weights[slots]));
        }
    }
    Ok((sets, wrong, worst))
}

fn mtp_difference(model: &mut DeepSeek, golden: &Golden, ids: &[u32]) -> Result<Option<f64>, Error> {
    if !golden.contains("mtp_logits") {
        return Ok(None);
    }
    let expected = golden.floats("mtp_logits")?;
    Sequence::new(ids.len(), ids.len(), 3).run(model, ids, LogitRows::All)?;
    // Row i of the module takes token i + 1 and predicts token i + 2; the last position has no next token.
    let mut batch = Batch::default();
    Sequence::new(ids.len(), ids.len(), 3).push(&mut batch, &ids[1..], LogitRows::All);
    let mut logits = vec![0.0; batch.logit_rows() * model.limits().vocab];
    model.forward_mtp(0, &batch, &mut logits)?;
    Ok(Some(max_abs_difference(&logits, &expected)))
}

/// Four sequences of mixed lengths: prompts of 5, 20 and 48 tokens and one that already decodes.
fn batch_difference(model: &mut DeepSeek, ids: &[u32]) -> Result<f64, Error> {
    let run = |model: &mut DeepSeek, together: bool| -> Result<Vec<f32>, Error> {
        let mut decoding = Sequence::new(9, 10, 12);
        decoding.run(model, &ids[..9], LogitRows::None)?;
        let parts: [(Sequence, &[u32]); 4] = [
            (Sequence::new(5, 5, 0), &ids[3..8]),
            (decoding, &ids[9..10]),
            (Sequence::new(48, 48, 1), ids),
            (Sequence::new(20, 20, 2), &ids[10..30]),
        ];
        let mut batch = Batch::default();
        let mut logits = Vec::new();
        for (mut sequence, tokens) in parts {
            sequence.push(&mut batch, tokens, LogitRows::All);
            if !together {
                logits.extend(forward(model, &batch)?);
                batch.clear();
            }
        }
        if together {
            logits = forward(model, &batch)?;
        }
        Ok(logits)
    };
    Ok(max_abs_difference(&run(model, true)?, &run(model, false)?))
}

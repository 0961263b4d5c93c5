//! `oxseek synth`: models of real shapes with random weights, for benchmarks.

mod folder;
mod pool;
mod shapes;
mod vocabulary;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    num::NonZero,
    path::Path,
    sync::Arc,
    thread,
    time::Instant,
};

use indicatif::ProgressBar;
use oxseek_tensor::{DType, Error, blocks::encode_row, conformance::Random};
use oxseek_weights::{
    Checkpoint, ModelConfig,
    gguf::{Array, GgmlType, GgufWriter, Slot, Source, describe, layout},
};

use self::{
    pool::Pool,
    shapes::Shape,
    vocabulary::{PRE, TEMPLATE, Words},
};
use crate::{
    args::SynthArgs,
    failure::Failure,
    formats::{FILE_TYPE_KEY, QUANTIZATION_VERSION, QUANTIZATION_VERSION_KEY, file_type, fitting, label},
    inspect::{count, size},
    pieces::Pieces,
    progress::bytes_bar,
};

/// Bytes that a thread makes at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// Writes a model.
pub fn synth(args: &SynthArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let shape = Shape::find(&args.shape, args.layers.map(usize::from))?;
    let out = &args.out;
    if out.exists() {
        return Err(Failure::Usage(format!("{} exists already", out.display())));
    }
    let words = Words::of(&shape.config)?;
    let bar = ProgressBar::hidden();
    let mut synth = Synth { shape, words, format: args.format, seed: args.seed, pools: HashMap::new(), bar };
    if out.extension().is_some_and(|e| e == "gguf") {
        synth.write_gguf(&args.shape, out)?;
    } else {
        folder::check(args.format)?;
        folder::write(&mut synth, out)?;
    }
    synth.bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let (parameters, bytes) = (count(synth.parameters()), size(synth.bar.length().unwrap_or(0)));
    println!("{}: {parameters} parameters, {bytes} in {seconds:.1} s", out.display());
    Ok(())
}

/// A model of a real shape without weights, for a backend that makes its own.
pub fn hollow(shape: &str, format: DType) -> Result<Checkpoint, Failure> {
    folder::check(format)?;
    let shape = Shape::find(shape, None)?;
    let words = Words::of(&shape.config)?;
    let synth = Synth { shape, words, format, seed: 0, pools: HashMap::new(), bar: ProgressBar::hidden() };
    Checkpoint::from_files(folder::hollow(&synth)?).map_err(|e| Failure::Model(e.to_string()))
}

/// A model in the making.
struct Synth {
    shape: Shape,
    words: Words,
    format: DType,
    seed: u64,
    /// By format and deviation.
    pools: HashMap<(DType, u32), Arc<Pool>>,
    bar: ProgressBar,
}

/// How a tensor is made.
#[derive(Clone)]
struct Recipe {
    slot: Slot,
    dtype: DType,
    mean: f32,
    deviation: f32,
}

impl Synth {
    fn expect(&mut self, bytes: u64) {
        self.bar = bytes_bar("writing", bytes);
    }

    fn parameters(&self) -> u64 {
        layout(&self.shape.config).iter().map(|s| s.shape.iter().product::<usize>() as u64).sum()
    }

    fn recipes(&self) -> Vec<Recipe> {
        layout(&self.shape.config)
            .into_iter()
            .map(|slot| Recipe::of(slot, self.format, &self.shape.config))
            .collect()
    }

    fn write_gguf(&mut self, name: &str, out: &Path) -> Result<(), Failure> {
        if GgmlType::of(self.format).is_none() {
            let why = format!("GGUF files have no {}: give an OUT that is a folder", label(self.format));
            return Err(Failure::Usage(why));
        }
        let recipes = self.recipes();
        let mut writer = GgufWriter::new();
        self.metadata(name, &mut writer)?;
        let mut total = 0;
        for r in &recipes {
            let kind = GgmlType::of(r.dtype)
                .ok_or_else(|| Failure::Usage(format!("GGUF files have no {}", r.dtype)))?;
            writer.tensor(&r.slot.name, kind, &r.slot.shape)?;
            total += r.bytes();
        }
        self.expect(total);
        // Under another name until it is whole: half a model must not pass for one.
        let part = out.with_extension("gguf.part");
        let mut body = writer.begin(Pieces::new(File::create(&part)?))?;
        for r in &recipes {
            self.fill(&r.slot.name, r, r.bytes(), &mut |bytes| body.write(bytes))?;
        }
        body.finish()?;
        fs::rename(&part, out)?;
        Ok(())
    }

    fn metadata(&self, name: &str, to: &mut GgufWriter) -> io::Result<()> {
        describe(&self.shape.config, to)?;
        let stem =
            Path::new(name).file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
        to.set("general.name", format!("{stem}-random"))?;
        to.set(FILE_TYPE_KEY, file_type(self.format))?;
        to.set(QUANTIZATION_VERSION_KEY, QUANTIZATION_VERSION)?;
        let words = &self.words;
        let kind = |id: usize| if words.control.contains(&(id as u32)) { 3 } else { 1 };
        let kinds: Vec<i32> = (0..words.texts.len()).map(kind).collect();
        to.set("tokenizer.ggml.model", "gpt2")?;
        to.set("tokenizer.ggml.pre", PRE)?;
        to.set("tokenizer.ggml.tokens", Array::texts(words.texts.iter().map(String::as_str)))?;
        to.set("tokenizer.ggml.token_type", Array::i32s(&kinds))?;
        to.set("tokenizer.ggml.merges", Array::texts([Words::merge().as_str()]))?;
        to.set("tokenizer.ggml.bos_token_id", words.control[0])?;
        to.set("tokenizer.ggml.eos_token_id", words.control[1])?;
        to.set("tokenizer.ggml.add_bos_token", true)?;
        to.set("tokenizer.chat_template", TEMPLATE)
    }

    fn pool(&mut self, recipe: &Recipe) -> Result<Arc<Pool>, Failure> {
        let key = (recipe.dtype, recipe.deviation.to_bits());
        if let Some(pool) = self.pools.get(&key) {
            return Ok(Arc::clone(pool));
        }
        let pool = Arc::new(Pool::new(recipe.dtype, recipe.deviation, self.seed).map_err(failed)?);
        self.pools.insert(key, Arc::clone(&pool));
        Ok(pool)
    }

    /// Gives `bytes` bytes of a tensor to `write`, in pieces that several threads make.
    fn fill(
        &mut self,
        name: &str,
        recipe: &Recipe,
        bytes: u64,
        write: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let seed = self.seed ^ seed_of(name);
        if recipe.mean != 0.0 || recipe.slot.shape.len() == 1 {
            let mut random = Random::new(seed);
            let len = bytes as usize / recipe.dtype.block_bytes();
            let values: Vec<f32> =
                (0..len).map(|_| recipe.mean + recipe.deviation * random.normal()).collect();
            let mut out = vec![0; bytes as usize];
            encode_row(recipe.dtype, &values, &mut out).map_err(failed)?;
            self.bar.inc(bytes);
            return Ok(write(&out)?);
        }
        let pool = self.pool(recipe)?;
        let chunk = CHUNK_BYTES / pool.block_bytes() * pool.block_bytes();
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let mut buffers = vec![vec![0; chunk]; threads.min((bytes as usize).div_ceil(chunk))];
        let (mut left, mut next) = (bytes as usize, 0);
        while left > 0 {
            let mut sizes = Vec::new();
            for _ in &buffers {
                sizes.push(left.min(chunk));
                left -= left.min(chunk);
            }
            thread::scope(|scope| {
                for (i, (buffer, n)) in buffers.iter_mut().zip(&sizes).enumerate() {
                    let pool = &pool;
                    scope.spawn(move || {
                        pool.fill(&mut Random::new(seed.wrapping_add(next + i as u64)), &mut buffer[..*n]);
                    });
                }
            });
            next += buffers.len() as u64;
            for (buffer, n) in buffers.iter().zip(sizes) {
                write(&buffer[..n])?;
                self.bar.inc(n as u64);
            }
        }
        Ok(())
    }

    fn scales(&mut self, name: &str, of: &Recipe, rows: usize, cols: usize) -> Result<Vec<f32>, Failure> {
        let mut random = Random::new(self.seed ^ seed_of(name));
        let scales = self.pool(of)?.scales(&mut random, rows, cols);
        self.bar.inc(scales.len() as u64 * 4);
        Ok(scales)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "map_err gives it away")]
fn failed(e: Error) -> Failure {
    Failure::Run(e.to_string())
}

/// FNV-1a: every tensor gets numbers of its own.
fn seed_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Recipe {
    /// Deviations that neither let the residual stream vanish nor explode: a row's norm is 1, and what is added to the
    /// stream is divided by the root of the number of additions.
    fn of(slot: Slot, format: DType, c: &ModelConfig) -> Self {
        let name = slot.name.clone();
        let is = |part: &str| name.contains(part);
        let cols = if is("attn_k_b") { c.kv_lora_rank } else { slot.cols() };
        let added = 1.0 / (2.0 * (c.num_hidden_layers + c.num_nextn_predict_layers) as f32).sqrt();
        let row = 1.0 / (cols.max(1) as f32).sqrt();
        let (mean, deviation) = match slot.shape.len() {
            1 if is("exp_probs_b") => (0.0, 0.02),
            1 => (1.0, 0.05),
            _ if is("token_embd") => (0.0, 1.0),
            // Sharp enough for a token to stand out.
            _ if name == "output.weight" => (0.0, 3.0 * row),
            _ if is("ffn_down_exps") || is("ffn_down_shexp") => (0.0, added * row),
            _ if is("ffn_down") || is("attn_output") => (0.0, 2.0 * added * row),
            _ => (0.0, row),
        };
        // As llama.cpp has them: whatever the format, vectors and the router are F32.
        let exact = slot.shape.len() == 1 || is("ffn_gate_inp");
        let dtype = if exact { DType::F32 } else { fitting(format, slot.cols()) };
        Self { slot, dtype, mean, deviation }
    }

    fn bytes(&self) -> u64 {
        let row = self.dtype.row_bytes(self.slot.cols()).unwrap_or(0);
        row as u64 * self.slot.rows() as u64
    }

    /// Names and shapes of what a Hugging Face checkpoint has for the slot.
    fn model_tensors(&self, c: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        let shape = self.slot.shape.clone();
        match &self.slot.source {
            Source::Vector(name) | Source::Matrix(name) => vec![(name.clone(), shape)],
            Source::Experts { layer, kind } => {
                let name = |e: usize| format!("model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight");
                (0..c.n_routed_experts).map(|e| (name(e), shape[1..].to_vec())).collect()
            }
            Source::LatentKeys { layer } => {
                let rows = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim);
                vec![(format!("model.layers.{layer}.self_attn.kv_b_proj.weight"), vec![rows, c.kv_lora_rank])]
            }
            // A part of the matrix above.
            Source::LatentValues { .. } => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use oxseek_model::{Batch, DeepSeek, LanguageModel, LoadOptions, LogitRows};
    use oxseek_tensor::reference::ReferenceBackend;

    use super::*;
    use crate::wording::Wording;

    /// A small model of V3's kind; rows of 40 fit no blocks.
    const CONFIG: &str = r#"{
        "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 40, "qk_rope_head_dim": 8, "v_head_dim": 32,
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 512, "num_nextn_predict_layers": 1,
        "vocab_size": 512, "bos_token_id": 7, "eos_token_id": 9
    }"#;

    fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
        let options = LoadOptions {
            context_tokens_max: 64,
            cache_blocks: 1,
            step_rows_max: 8,
            logit_rows_max: 1,
            cache_format: oxseek_tensor::CacheFormat::F32,
        };
        let backend = Box::new(ReferenceBackend::new());
        let mut model = DeepSeek::load(checkpoint, backend, options, &mut |_, _| {}).unwrap();
        let mut logits = vec![0.0; 512];
        let mut batch = Batch::default();
        batch.push(&[7, 20, 30, 40, 50], 0, 5, &[0], LogitRows::Last);
        model.forward(&batch, &mut logits).unwrap();
        logits
    }

    /// Every tensor is there by its name and shape, or the model would not load.
    #[test]
    fn a_hollow_model_loads() {
        let folder = std::env::temp_dir().join(format!("oxseek-hollow-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let config = folder.join("small.json");
        fs::write(&config, CONFIG).unwrap();
        for format in [DType::BF16, DType::F8E4M3] {
            let checkpoint = hollow(&config.to_string_lossy(), format).unwrap();
            assert!(logits(&checkpoint).iter().all(|v| *v == 0.0));
        }
        assert!(hollow(&config.to_string_lossy(), DType::Q4K).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn models_run_and_neither_vanish_nor_explode() {
        let folder = std::env::temp_dir().join(format!("oxseek-synth-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let config = folder.join("small.json");
        fs::write(&config, CONFIG).unwrap();
        let shape = config.to_string_lossy().into_owned();
        for (format, out) in
            [("q4_0", "a.gguf"), ("q4_k", "b.gguf"), ("bf16", "c.gguf"), ("bf16", "d"), ("fp8", "e")]
        {
            let out = folder.join(out);
            let args = SynthArgs {
                shape: shape.clone(),
                layers: None,
                format: crate::formats::parse(format).unwrap(),
                seed: 3,
                out: out.clone(),
            };
            super::synth(&args).unwrap();
            assert!(super::synth(&args).is_err_and(|e| e.to_string().contains("exists already")));
            let checkpoint = Checkpoint::open(&out).unwrap();
            let logits = logits(&checkpoint);
            let deviation = (logits.iter().map(|v| v * v).sum::<f32>() / 512.0).sqrt();
            assert!((1.0..9.0).contains(&deviation), "{format}: {deviation}");
            let words = Wording::of(&checkpoint).unwrap();
            let text = "any text: \u{e9}\u{4e2d}\u{1f600}\n";
            let ids = words.tokenizer.encode(text, oxseek_text::ControlTokens::AsText).unwrap();
            assert_eq!(words.tokenizer.decode(&ids), text);
            assert_eq!((words.tokenizer.bos_id(), words.tokenizer.eos_id()), (Some(7), Some(9)));
        }
        for (format, out, why) in [("fp8", "f.gguf", "have no fp8"), ("q4_0", "g", "ends in .gguf")] {
            let format = crate::formats::parse(format).unwrap();
            let args =
                SynthArgs { shape: shape.clone(), layers: None, format, seed: 1, out: folder.join(out) };
            assert!(super::synth(&args).is_err_and(|e| e.to_string().contains(why)));
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

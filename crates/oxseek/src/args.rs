//! The command line.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args as ClapArgs, Parser, Subcommand};
use oxseek_backend_cpu::{Level, Precision};
use oxseek_tensor::{CacheFormat, DType};

use crate::{formats, key::KeyArgs, open::STEP_ROWS_ALONE, quantize::Target, serve::entry::EntryArgs};

/// Runs and serves models of the DeepSeek family.
///
/// Without --model it uses the small demo model that is built in.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer one prompt, from the command line or from standard input
    Run(RunArgs),
    /// Talk to the model in the terminal
    Chat(ChatArgs),
    /// Serve the OpenAI-compatible API and the chat page
    Serve(ServeArgs),
    /// Make, list and revoke the API keys of a key file
    Key(KeyArgs),
    /// Show a checkpoint's architecture, parameters and bytes
    Inspect(InspectArgs),
    /// Tell before loading what a model needs, whether that fits, and how fast it will be
    Plan(PlanArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
    /// Write a checkpoint as a GGUF file in another format
    Quantize(QuantizeArgs),
    /// Write a model of a real shape with random weights, for benchmarks
    Synth(SynthArgs),
    /// Check every kernel and the model's answers on this machine
    Selftest(SelftestArgs),
}

/// Which model, on what.
#[derive(Debug, Clone, ClapArgs)]
pub struct ModelArgs {
    /// Folder of a Hugging Face checkpoint (config.json, tokenizer.json, *.safetensors) or a GGUF
    /// file (of a model in parts any one)
    #[arg(short, long, env = "OXSEEK_MODEL", value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Where it runs: cpu, cuda (an NVIDIA GPU), cuda:N (the GPU with that number); auto takes a GPU
    /// that holds the model, else the CPU
    #[arg(long, env = "OXSEEK_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Threads that compute; default: the cores this process may use
    #[arg(short, long, env = "OXSEEK_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// SIMD level: scalar, avx2, avx512, avx512-vnni or neon; default: the best this CPU has
    #[arg(long, env = "OXSEEK_CPU_LEVEL")]
    pub cpu_level: Option<Level>,
    /// What activations are rounded to: exact is F32, native is what the CPU multiplies fastest
    /// with the weights' format (BF16, or 8 bits per 128 columns)
    #[arg(long, env = "OXSEEK_PRECISION", value_enum, default_value_t = PrecisionArg::Native)]
    pub precision: PrecisionArg,
    /// How the latent cache is stored; default: f32 with exact precision, bf16 with native
    #[arg(long, env = "OXSEEK_CACHE_TYPE", value_enum)]
    pub cache_type: Option<CacheTypeArg>,
    /// Longest conversation in tokens, answer included; default: the model's own, at most 4096
    #[arg(short, long, env = "OXSEEK_CTX", value_name = "TOKENS")]
    pub ctx: Option<usize>,
    /// Where routed experts are: packed in memory (ram), or in the mapped files and read when they
    /// are chosen (disk); auto takes disk when memory is short
    #[arg(long, env = "OXSEEK_EXPERTS", value_enum, default_value_t = ExpertsArg::Auto)]
    pub experts: ExpertsArg,
}

/// Where a model runs, on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceArg {
    /// A GPU that holds the model, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device with this number.
    Cuda(u16),
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || format!("{s:?} is no device: auto, cpu, cuda or cuda:N");
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => s.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Self::Cuda).ok_or_else(wrong),
        }
    }
}

/// Where routed experts are, on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ExpertsArg {
    Auto,
    Ram,
    Disk,
}

/// [`Precision`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionArg {
    Exact,
    Native,
}

impl From<PrecisionArg> for Precision {
    fn from(p: PrecisionArg) -> Self {
        match p {
            PrecisionArg::Exact => Self::Exact,
            PrecisionArg::Native => Self::Native,
        }
    }
}

/// [`CacheFormat`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheTypeArg {
    F32,
    Bf16,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    Fp8,
}

impl ModelArgs {
    /// How the latent cache is stored.
    pub fn cache_format(&self) -> CacheFormat {
        match (self.cache_type, self.precision) {
            (None, PrecisionArg::Exact) | (Some(CacheTypeArg::F32), _) => CacheFormat::F32,
            (None, PrecisionArg::Native) | (Some(CacheTypeArg::Bf16), _) => CacheFormat::Bf16,
            (Some(CacheTypeArg::F16), _) => CacheFormat::F16,
            (Some(CacheTypeArg::Q8_0), _) => CacheFormat::Q8_0,
            (Some(CacheTypeArg::Fp8), _) => CacheFormat::Fp8,
        }
    }
}

/// How tokens are chosen.
#[derive(Debug, Clone, ClapArgs)]
pub struct SamplingArgs {
    /// Most tokens of an answer; default: until the model stops or the context is full
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 always takes the most likely token; default: what the model recommends
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep only the most likely tokens that together have this probability
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Keep only this many of the most likely tokens; 0 keeps all
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Drop tokens less likely than this part of the most likely one
    #[arg(long)]
    pub min_p: Option<f32>,
    /// Same seed, same text
    #[arg(long)]
    pub seed: Option<u64>,
    /// Let the model think before it answers, if it can
    #[arg(long)]
    pub think: bool,
}

/// `oxseek run`
#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    /// The prompt; without one, or as `-`, it is read from standard input
    pub prompt: Option<String>,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// System prompt
    #[arg(long, conflicts_with = "raw")]
    pub system: Option<String>,
    /// Print tokens, time to first token and tokens/s to standard error
    #[arg(long)]
    pub stats: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `oxseek chat`
#[derive(Debug, ClapArgs)]
pub struct ChatArgs {
    /// System prompt
    #[arg(long)]
    pub system: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `oxseek serve`
#[derive(Debug, ClapArgs)]
pub struct ServeArgs {
    /// Address to listen on; anything but loopback needs a key or --allow-no-key
    #[arg(long, env = "OXSEEK_HOST", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one and prints it
    #[arg(short, long, env = "OXSEEK_PORT", default_value_t = 8080)]
    pub port: u16,
    /// Requests that are answered at the same time; more wait
    #[arg(long, env = "OXSEEK_PARALLEL", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    /// Requests that may wait; more are refused with 429
    #[arg(long, env = "OXSEEK_QUEUE", default_value_t = 256)]
    pub queue: usize,
    #[command(flatten)]
    pub entry: EntryArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `oxseek inspect`
#[derive(Debug, ClapArgs)]
pub struct InspectArgs {
    /// Folder of a Hugging Face checkpoint or GGUF file; default: the built-in demo model
    #[arg(value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// List every tensor too
    #[arg(long)]
    pub tensors: bool,
}

/// `oxseek plan`
#[derive(Debug, ClapArgs)]
pub struct PlanArgs {
    /// Folder of a Hugging Face checkpoint or GGUF file; default: --model, or the built-in demo model
    #[arg(value_name = "MODEL")]
    pub path: Option<PathBuf>,
    /// Requests that are answered at the same time
    #[arg(long, env = "OXSEEK_PARALLEL", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    /// Print one JSON object; sizes in bytes
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `oxseek bench`
#[derive(Debug, ClapArgs)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Measure a model of this shape (v2-lite, moonlight, v3, or the path of a config.json) whose
    /// weights are random numbers made on the GPU; needs --device cuda
    #[arg(long, conflicts_with = "model")]
    pub shape: Option<String>,
    /// Format of those weights: bf16, fp8 or f32
    #[arg(long, value_parser = formats::parse, default_value = "bf16", requires = "shape")]
    pub weights: DType,
    /// Tokens of the prompt; 0 measures no prefill
    #[arg(short, long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub prompt: u32,
    /// Tokens to generate; 0 measures no decoding
    #[arg(short = 'n', long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub generate: u32,
    /// Sequences that run together
    #[arg(short, long, default_value = "1,8", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch: Vec<u16>,
    /// Tokens of context before the prompt and before the generated tokens
    #[arg(short, long, default_value = "0", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=1_048_576))]
    pub depth: Vec<u32>,
    /// Most rows of one step of a prompt; as many as where one conversation runs, while `serve` takes 512 so that the
    /// answers of others go on
    #[arg(long, default_value_t = STEP_ROWS_ALONE, value_parser = clap::value_parser!(u16).range(1..=16384))]
    pub step_rows: u16,
    /// Show where the time went, op by op
    #[arg(long)]
    pub profile: bool,
    /// Take the model out of the system's file cache first, so that the start reads it from disk, and
    /// measure how fast the disk is
    #[arg(long)]
    pub cold: bool,
    /// Measure only what this machine can do, reading and multiplying; no model is loaded
    #[arg(long)]
    pub limit: bool,
    /// GPUs: measure the kernels that decide a model's speed, each alone; no model is loaded
    #[arg(long, conflicts_with_all = ["limit", "cold", "profile"])]
    pub kernels: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = BenchFormat::Table)]
    pub format: BenchFormat,
    /// Runs of each test; the median counts
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
}

/// `oxseek quantize`
#[derive(Debug, ClapArgs)]
pub struct QuantizeArgs {
    /// Folder of a Hugging Face checkpoint or GGUF file (of a model in parts any one)
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The GGUF file to write
    pub out: PathBuf,
    /// Format of the weights: q8_0, q4_0, q4_k, q4_k_m, q6_k, bf16, ...; where rows do not fit a
    /// format, what llama-quantize takes instead; vectors and routers are F32
    #[arg(long, value_parser = Target::parse)]
    pub format: Target,
    /// All weights in the one format; else the head is q6_k or q8_0
    #[arg(long)]
    pub pure: bool,
    /// Format of the head
    #[arg(long, value_parser = formats::parse, value_name = "FORMAT")]
    pub output_tensor_type: Option<DType>,
    /// Format of the embedding
    #[arg(long, value_parser = formats::parse, value_name = "FORMAT")]
    pub token_embedding_type: Option<DType>,
    /// Threads that compute; default: the cores this process may use
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// `oxseek synth`
#[derive(Debug, ClapArgs)]
pub struct SynthArgs {
    /// tiny (77 M parameters), mid (3.1 B), v2-lite, moonlight, v3, or the path of a config.json
    #[arg(long)]
    pub shape: String,
    /// Layers, instead of as many as the shape has
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub layers: Option<u16>,
    /// Format of the weights: f32, bf16, fp8, q8_0, q4_0, q4_k, ...; where rows do not fit a format,
    /// what llama-quantize takes instead; vectors and routers are F32 in GGUF files
    #[arg(long, value_parser = formats::parse)]
    pub format: DType,
    /// Same seed, same weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// A GGUF file, if it ends in .gguf, else a Hugging Face folder (f32, f16, bf16 and fp8 only)
    pub out: PathBuf,
}

/// How `oxseek bench` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchFormat {
    /// For people
    Table,
    /// One object; rates in bytes and operations per second, parts of limits from 0 to 1
    Json,
    /// A row per test, with --profile one per op too
    Csv,
}

/// `oxseek selftest`
#[derive(Debug, ClapArgs)]
pub struct SelftestArgs {
    /// Folder with golden checkpoints (this project's goldens/): compares logits, routing, greedy text and MTP
    #[arg(long, value_name = "FOLDER")]
    pub goldens: Option<PathBuf>,
    /// Only show what each storage format costs the demo model, and check it against its tolerance
    #[cfg(feature = "demo")]
    #[arg(long)]
    pub formats: bool,
    /// What is checked: cpu, cuda or cuda:N; auto checks the CPU
    #[arg(long, env = "OXSEEK_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Threads that compute; default: 1, 2 and 8
    #[arg(short, long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_or_refused() {
        for (text, device) in [
            ("auto", DeviceArg::Auto),
            ("cpu", DeviceArg::Cpu),
            ("cuda", DeviceArg::Cuda(0)),
            ("cuda:3", DeviceArg::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:70000", "CUDA"] {
            assert!(text.parse::<DeviceArg>().is_err_and(|e| e.contains("is no device")), "{text}");
        }
    }
}

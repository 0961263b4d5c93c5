//! `oxseek quantize`: any checkpoint to a GGUF file in another format.

mod input;
mod metadata;
mod scheme;

use std::{
    fs::{self, File},
    num::NonZero,
    ops::Range,
    panic::resume_unwind,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use indicatif::ProgressBar;
use oxseek_tensor::{
    DType,
    blocks::{decode_row, encode_row},
};
use oxseek_weights::{
    Checkpoint,
    gguf::{GgmlType, GgufBody, GgufWriter},
};

use self::input::Input;
pub use self::scheme::{Scheme, Target};
use crate::{
    args::QuantizeArgs, failure::Failure, inspect::size, open::open_checkpoint, pieces::Pieces,
    progress::bytes_bar,
};

/// Values that a thread decodes at a time: memory stays bounded whatever the size of the model.
const PIECE_VALUES: usize = 1 << 20;
/// Pieces per thread between two writes: enough that no thread waits long for the last one.
const PIECES_PER_THREAD: usize = 4;
/// Largest value that formats with halves as scales can hold.
const HALF_MAX: f32 = 65_504.0;

/// Writes the file.
pub fn quantize(args: &QuantizeArgs) -> Result<(), Failure> {
    let started = Instant::now();
    check_out(&args.out)?;
    let (name, checkpoint) = open_checkpoint(Some(&args.input))?;
    let threads =
        args.threads.map_or_else(|| thread::available_parallelism().map_or(1, NonZero::get), usize::from);
    let config = checkpoint.config();
    let scheme = Scheme {
        target: args.format,
        pure: args.pure,
        output: args.output_tensor_type,
        embedding: args.token_embedding_type,
        tied: config.tie_word_embeddings,
        layers: config.num_hidden_layers + config.num_nextn_predict_layers,
        through: None,
    };
    let from: u64 = checkpoint.tensors().map(|t| t.bytes as u64).sum();
    let to = write(&checkpoint, &name, &scheme, threads, &args.out)?;
    let seconds = started.elapsed().as_secs_f64();
    println!("{}: {} from {} in {seconds:.1} s", args.out.display(), size(to), size(from));
    Ok(())
}

fn check_out(out: &Path) -> Result<(), Failure> {
    if out.extension().is_none_or(|e| e != "gguf") {
        return Err(Failure::Usage(format!("{}: OUT must end in .gguf", out.display())));
    }
    if out.exists() {
        return Err(Failure::Usage(format!("{} exists already", out.display())));
    }
    Ok(())
}

/// Writes `checkpoint` as a GGUF file at `out`; gives the bytes of its tensors.
pub fn write(
    checkpoint: &Checkpoint,
    name: &str,
    scheme: &Scheme,
    threads: usize,
    out: &Path,
) -> Result<u64, Failure> {
    let inputs = Input::all(checkpoint).map_err(|e| Failure::Model(e.to_string()))?;
    let mut writer = GgufWriter::new();
    metadata::write(checkpoint, name, scheme.file_type(), &mut writer)?;
    let mut jobs = Vec::with_capacity(inputs.len());
    let mut total = 0;
    for input in &inputs {
        let dtype = scheme.dtype(input);
        let kind =
            GgmlType::of(dtype).ok_or_else(|| Failure::Usage(format!("GGUF files have no {dtype}")))?;
        writer.tensor(&input.name, kind, &input.shape)?;
        let job = Job { through: scheme.through(input), ..Job::new(input, dtype)? };
        total += (job.row_bytes * input.rows()) as u64;
        jobs.push(job);
    }
    warn_of_loss(&jobs);
    let bar = bytes_bar("quantizing", total);
    // Under another name until it is whole: half a model must not pass for one.
    let part = out.with_extension("gguf.part");
    let file = Pieces::new(File::create(&part)?);
    let written = stream(writer.begin(file)?, &jobs, threads, &bar);
    bar.finish_and_clear();
    if let Err(e) = written {
        let _ = fs::remove_file(&part);
        return Err(e);
    }
    fs::rename(&part, out)?;
    Ok(total)
}

/// Blocks that are rounded a second time lose more than the format alone would.
fn warn_of_loss(jobs: &[Job<'_>]) {
    let again = |job: &&Job<'_>| job.input.dtype().is_some_and(|d| d.block_len() > 1 && d != job.dtype);
    let count = jobs.iter().filter(again).count();
    if let Some((job, from)) = jobs.iter().find(again).and_then(|job| Some((job, job.input.dtype()?))) {
        let (name, to) = (&job.input.name, job.dtype);
        eprintln!(
            "oxseek: warning: {count} tensors are rounded a second time: {name} from {from} to {to}, ..."
        );
    }
}

/// A tensor on its way.
struct Job<'a> {
    input: &'a Input,
    dtype: DType,
    through: Option<DType>,
    row_bytes: usize,
    /// Rows of a piece.
    rows: usize,
}

impl<'a> Job<'a> {
    fn new(input: &'a Input, dtype: DType) -> Result<Self, Failure> {
        let cols = input.cols();
        let row_bytes = dtype.row_bytes(cols).ok_or_else(|| {
            let why =
                format!("rows of {cols} are no whole number of {dtype}'s blocks of {}", dtype.block_len());
            Failure::Usage(format!("tensor {}: {why}", input.name))
        })?;
        let together = input.rows_together();
        let rows = (PIECE_VALUES / (cols * together).max(1)).max(1) * together;
        Ok(Self { input, dtype, through: None, row_bytes, rows })
    }

    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let all = self.input.rows();
        (0..all).step_by(self.rows).map(move |from| from..(from + self.rows).min(all))
    }

    fn encode(&self, rows: Range<usize>) -> Result<Vec<u8>, Failure> {
        if self.through.is_none()
            && let Some(bytes) = self.input.stored(self.dtype, rows.clone())
        {
            return Ok(bytes.to_vec());
        }
        let mut values = vec![0.0; rows.len() * self.input.cols()];
        self.input.decode(rows.clone(), &mut values);
        let most = match self.dtype {
            DType::F32 | DType::BF16 => f32::MAX,
            _ => HALF_MAX,
        };
        if let Some(v) = values.iter().find(|v| v.is_nan() || v.abs() > most) {
            let why = format!("{v} cannot be stored as {}", self.dtype);
            return Err(Failure::Model(format!("tensor {}: {why}", self.input.name)));
        }
        if let Some(dtype) = self.through {
            round(dtype, &mut values)
                .map_err(|e| Failure::Run(format!("tensor {}: {e}", self.input.name)))?;
        }
        let mut out = vec![0; rows.len() * self.row_bytes];
        encode_row(self.dtype, &values, &mut out).map_err(|e| Failure::Run(e.to_string()))?;
        Ok(out)
    }
}

/// Values as they come back from a format.
fn round(dtype: DType, values: &mut [f32]) -> Result<(), oxseek_tensor::Error> {
    let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap_or(0)];
    encode_row(dtype, values, &mut bytes)?;
    decode_row(dtype, &bytes, values);
    Ok(())
}

/// Encodes on all threads and writes in order. A group of pieces is in memory at a time.
fn stream<W: std::io::Write>(
    mut body: GgufBody<W>,
    jobs: &[Job<'_>],
    threads: usize,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let all: Vec<(&Job<'_>, Range<usize>)> =
        jobs.iter().flat_map(|job| job.pieces().map(move |rows| (job, rows))).collect();
    for group in all.chunks(threads * PIECES_PER_THREAD) {
        for bytes in encode_group(group, threads) {
            let bytes = bytes?;
            body.write(&bytes)?;
            bar.inc(bytes.len() as u64);
        }
    }
    body.finish()?;
    Ok(())
}

fn encode_group(group: &[(&Job<'_>, Range<usize>)], threads: usize) -> Vec<Result<Vec<u8>, Failure>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some((job, rows)) = group.get(i) else { return done };
            done.push((i, job.encode(rows.clone())));
        }
    };
    let mut results: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().flat_map(|t| t.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, bytes)| bytes).collect()
}

#[cfg(feature = "demo")]
#[cfg(test)]
mod tests {
    use oxseek_text::ControlTokens;

    use super::*;
    use crate::{format_table::Temporary, wording::Wording};

    fn demo() -> Checkpoint {
        open_checkpoint(None).unwrap().1
    }

    fn scheme(format: &str) -> Scheme {
        let target = Target::parse(format).unwrap();
        Scheme { target, pure: false, output: None, embedding: None, tied: false, layers: 8, through: None }
    }

    fn written(from: &Checkpoint, format: &str, name: &str) -> (Checkpoint, Temporary) {
        let file = Temporary::new(name);
        write(from, "demo", &scheme(format), 2, &file.0).unwrap();
        (Checkpoint::open(&file.0).unwrap(), file)
    }

    /// A matrix as F32.
    fn values(checkpoint: &Checkpoint, name: &str, rows: usize, cols: usize) -> Vec<f32> {
        let matrix = checkpoint.matrix(name, rows, cols).unwrap();
        let mut out = vec![0.0; rows * cols];
        out.chunks_exact_mut(cols).enumerate().for_each(|(i, row)| matrix.decode_row(i, row));
        out
    }

    #[test]
    fn a_folder_becomes_the_same_model_in_one_file() {
        let folder = demo();
        let (file, _guard) = written(&folder, "f32", "same-model");
        assert!(file.warnings().is_empty(), "{:?}", file.warnings());
        assert_eq!(file.config(), folder.config());
        let layer = "model.layers.3";
        for (name, rows, cols) in [
            ("model.embed_tokens.weight".to_string(), 4096, 384),
            (format!("{layer}.self_attn.kv_b_proj.weight"), 6 * 128, 128),
            (format!("{layer}.self_attn.q_b_proj.weight"), 6 * 96, 192),
            (format!("{layer}.mlp.gate.weight"), 16, 384),
            (format!("{layer}.mlp.experts.15.down_proj.weight"), 384, 128),
            // The MTP layer.
            ("model.layers.7.eh_proj.weight".to_string(), 384, 768),
            ("model.layers.7.mlp.experts.0.up_proj.weight".to_string(), 128, 384),
        ] {
            assert_eq!(values(&file, &name, rows, cols), values(&folder, &name, rows, cols), "{name}");
        }
        let bias = format!("{layer}.mlp.gate.e_score_correction_bias");
        assert_eq!(file.vector(&bias, 16).unwrap(), folder.vector(&bias, 16).unwrap());
        let [a, b] = [&file, &folder].map(|c| Wording::of(c).unwrap());
        let text = "<｜User｜>Don't 123456 caf\u{e9}\n<｜Assistant｜></think>";
        let tokens = |w: &Wording| w.tokenizer.encode(text, ControlTokens::Parse).unwrap();
        assert_eq!(tokens(&a), tokens(&b));
        assert_eq!(
            (a.tokenizer.bos_id(), a.tokenizer.eos_id()),
            (b.tokenizer.bos_id(), b.tokenizer.eos_id())
        );
        assert!(a.template.is_some());
        assert_eq!((a.sampling.temperature, a.sampling.top_p), (b.sampling.temperature, b.sampling.top_p));
    }

    #[test]
    fn a_file_becomes_another_and_keeps_what_it_says() {
        let (first, _first) = written(&demo(), "bf16", "bf16");
        let (second, _second) = written(&first, "q4_k", "q4_k");
        assert_eq!(second.config(), first.config());
        let gguf = second.gguf().unwrap();
        let kind = |name: &str| gguf.tensor(name).unwrap().kind.name();
        // Rows of 384 are no whole number of super-blocks.
        assert_eq!(kind("blk.2.ffn_up_exps.weight"), "Q5_0");
        assert_eq!(kind("output.weight"), "Q8_0");
        assert_eq!(kind("blk.2.ffn_gate_inp.weight"), "F32");
        assert_eq!(kind("blk.7.nextn.eh_proj.weight"), "Q4_K");
        assert_eq!(gguf.get("general.file_type").and_then(oxseek_weights::gguf::Value::as_i64), Some(14));
        // Not rounded again when the format stays.
        let (third, _third) = written(&second, "q4_k", "again");
        let bytes =
            |c: &Checkpoint| c.gguf().unwrap().tensor("blk.2.ffn_up_exps.weight").unwrap().bytes.to_vec();
        assert!(bytes(&third) == bytes(&second));
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        assert!(check_out(Path::new("model.bin")).is_err_and(|e| e.to_string().contains(".gguf")));
        assert!(check_out(Path::new("a/model.gguf")).is_ok());
    }
}

//! A Hugging Face folder: `config.json`, tokenizer files and shards of safetensors.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    sync::Arc,
};

use memmap2::MmapMut;
use oxseek_tensor::{ByteRegion, DType};
use serde_json::{Map, Value, json};

use super::{Recipe, Synth, vocabulary::Words};
use crate::{failure::Failure, formats::label, pieces::Pieces};

/// Largest shard, as on the hub.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// A tensor of a shard.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    dtype: &'static str,
    bytes: u64,
    filling: Filling,
}

enum Filling {
    Weights(Recipe),
    /// The multipliers of the FP8 blocks of such a matrix.
    Scales {
        of: Recipe,
        rows: usize,
        cols: usize,
    },
}

/// Writes the folder, which must not be there yet.
pub fn write(synth: &mut Synth, out: &Path) -> Result<(), Failure> {
    fs::create_dir(out)?;
    let shards = shards(tensors(synth));
    let total: u64 = shards.iter().flatten().map(|t| t.bytes).sum();
    synth.expect(total);
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), file.clone().into())));
        write_shard(synth, shard, &out.join(file))?;
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        fs::write(out.join("model.safetensors.index.json"), index.to_string())?;
    }
    let context = synth.shape.config.max_position_embeddings;
    for (name, json) in [
        ("config.json", config(synth)),
        ("tokenizer.json", synth.words.json()?),
        ("tokenizer_config.json", Words::config_json(context)),
    ] {
        fs::write(out.join(name), json.to_string())?;
    }
    Ok(())
}

fn config(synth: &Synth) -> Value {
    let mut json = synth.shape.json.clone();
    if synth.format == DType::F8E4M3 {
        let quantization = json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        });
        json.insert("quantization_config".into(), quantization);
    } else {
        let name = match synth.format {
            DType::F32 => "float32",
            DType::F16 => "float16",
            _ => "bfloat16",
        };
        json.insert("torch_dtype".into(), name.into());
    }
    Value::Object(json)
}

/// All tensors by their names in a Hugging Face checkpoint.
fn tensors(synth: &Synth) -> Vec<Tensor> {
    let mut all = Vec::new();
    for recipe in synth.recipes() {
        for (name, shape) in recipe.model_tensors(&synth.shape.config) {
            let matrix = shape.len() > 1;
            let dtype = match synth.format {
                DType::F8E4M3 if !matrix || !is_fp8(&name) => DType::BF16,
                _ if name.ends_with("e_score_correction_bias") => DType::F32,
                format => format,
            };
            let recipe = Recipe { dtype, ..recipe.clone() };
            let elements = shape.iter().product::<usize>();
            let bytes = (elements * dtype.block_bytes()) as u64;
            let fp8 = dtype == DType::F8E4M3;
            if fp8 {
                let (rows, cols) = (shape[0], shape[1]);
                let grid = vec![rows.div_ceil(128), cols.div_ceil(128)];
                all.push(Tensor {
                    name: format!("{name}_scale_inv"),
                    bytes: (grid[0] * grid[1] * 4) as u64,
                    shape: grid,
                    dtype: "F32",
                    filling: Filling::Scales { of: recipe.clone(), rows, cols },
                });
            }
            all.push(Tensor { name, shape, dtype: dtype.name(), bytes, filling: Filling::Weights(recipe) });
        }
    }
    all
}

/// Whether DeepSeek's FP8 checkpoints have this matrix in FP8: all but the embedding, the heads and the router.
fn is_fp8(name: &str) -> bool {
    (name.contains(".self_attn.") || name.contains(".mlp.")) && !name.ends_with(".mlp.gate.weight")
}

fn shards(tensors: Vec<Tensor>) -> Vec<Vec<Tensor>> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut room = 0;
    for t in tensors {
        if t.bytes > room || shards.is_empty() {
            shards.push(Vec::new());
            room = SHARD_BYTES_MAX;
        }
        room = room.saturating_sub(t.bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(t);
        }
    }
    shards
}

/// The length of a shard's header and the header, as safetensors begin; and the bytes of the tensors.
fn shard_head(tensors: &[Tensor]) -> (Vec<u8>, u64) {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for t in tensors {
        let dtype = if t.dtype == DType::F8E4M3.name() { "F8_E4M3" } else { t.dtype };
        let entry = json!({ "dtype": dtype, "shape": t.shape, "data_offsets": [end, end + t.bytes] });
        header.insert(t.name.clone(), entry);
        end += t.bytes;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut head = (header.len() as u64).to_le_bytes().to_vec();
    head.extend(header);
    (head, end)
}

fn write_shard(synth: &mut Synth, tensors: &[Tensor], path: &Path) -> Result<(), Failure> {
    let mut file = Pieces::new(File::create(path)?);
    file.write_all(&shard_head(tensors).0)?;
    for t in tensors {
        match &t.filling {
            Filling::Weights(recipe) => {
                synth.fill(&t.name, recipe, t.bytes, &mut |bytes| file.write_all(bytes))?;
            }
            Filling::Scales { of, rows, cols } => {
                for scale in synth.scales(&t.name, of, *rows, *cols)? {
                    file.write_all(&scale.to_le_bytes())?;
                }
            }
        }
    }
    file.flush()?;
    Ok(())
}

/// The files of a model whose weights are never read: the names and shapes, and pages of zeros that cost no memory as
/// long as nobody looks at them.
pub fn hollow(synth: &Synth) -> Result<Vec<(String, ByteRegion)>, Failure> {
    let (head, bytes) = shard_head(&tensors(synth));
    let mut map = MmapMut::map_anon(head.len() + bytes as usize)?;
    map[..head.len()].copy_from_slice(&head);
    let config = config(synth).to_string().into_bytes();
    Ok(vec![
        ("config.json".into(), ByteRegion::from_vec(config)),
        ("model.safetensors".into(), ByteRegion::whole(Arc::new(map))),
    ])
}

/// The formats that safetensors have.
pub fn check(format: DType) -> Result<(), Failure> {
    match format {
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 => Ok(()),
        other => Err(Failure::Usage(format!(
            "{} is a format of GGUF files: give an OUT that ends in .gguf",
            label(other)
        ))),
    }
}

//! A checkpoint: configuration, tensors and text files of one model.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use oxseek_tensor::{
    ByteRegion, DType, HostMatrix,
    dtype::{FP8_BLOCK, bf16_to_f32, f16_to_f32, ue8m0_to_f32},
};

use crate::{Error, ModelConfig, SafeTensors, TensorView, json, mmap};

const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
/// Text files that are kept for others to read.
const TEXT_FILES: [&str; 5] =
    [CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
/// Largest of those.
const TEXT_FILE_BYTES_MAX: u64 = 256 << 20;
/// Largest index: four times that of the largest model there is.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// A model on disk or in memory.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    shards: Vec<SafeTensors>,
    /// Tensor to shard.
    shard_of: BTreeMap<String, usize>,
    text: BTreeMap<String, ByteRegion>,
}

/// What the headers say of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type as the file spells it.
    pub dtype: &'a str,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Its bytes.
    pub bytes: usize,
    /// The file it is in.
    pub file: &'a str,
}

impl Checkpoint {
    /// Opens a Hugging Face folder; weights are mapped, not read.
    ///
    /// # Errors
    /// [`Error`], naming the file and what to do.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let meta = fs::metadata(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
        if !meta.is_dir() {
            let why = "expected a folder with config.json and *.safetensors".to_string();
            return Err(Error::Folder { path: folder.into(), why });
        }
        let mut text = BTreeMap::new();
        for name in TEXT_FILES.into_iter().chain([INDEX]) {
            let path = folder.join(name);
            if path.exists() {
                text.insert(name.to_string(), read_text(&path)?);
            }
        }
        if !text.contains_key(CONFIG) {
            let why = format!("no {CONFIG}: is this the folder of a Hugging Face checkpoint?");
            return Err(Error::Folder { path: folder.into(), why });
        }
        let mut shards = Vec::new();
        for name in weight_files(folder, text.get(INDEX))? {
            let path = folder.join(&name);
            if !path.exists() {
                let why = format!("{name} is missing: {INDEX} lists it; is the download complete?");
                return Err(Error::Folder { path: folder.into(), why });
            }
            shards.push((name, mmap::map(&path)?));
        }
        Self::assemble(text, shards)
    }

    /// Takes a checkpoint whose files are in memory already: an embedded model, a browser's download.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_files(files: Vec<(String, ByteRegion)>) -> Result<Self, Error> {
        let mut text = BTreeMap::new();
        let mut shards: Vec<(String, ByteRegion)> = Vec::new();
        for (file, region) in files {
            let twice = if is_safetensors(&file) {
                let twice = shards.iter().any(|(other, _)| *other == file);
                shards.push((file.clone(), region));
                twice
            } else {
                text.insert(file.clone(), region).is_some()
            };
            if twice {
                return Err(Error::File { file, why: "given twice".into() });
            }
        }
        if shards.is_empty() {
            return Err(Error::File {
                file: SINGLE.into(),
                why: "missing, and no other .safetensors".into(),
            });
        }
        Self::assemble(text, shards)
    }

    fn assemble(text: BTreeMap<String, ByteRegion>, files: Vec<(String, ByteRegion)>) -> Result<Self, Error> {
        let bytes = |name: &str| text.get(name).map(ByteRegion::bytes);
        let missing = || Error::File { file: CONFIG.into(), why: "missing".into() };
        let config = ModelConfig::parse(bytes(CONFIG).ok_or_else(missing)?, bytes("generation_config.json"))?;
        let mut shards: Vec<SafeTensors> = Vec::new();
        let mut shard_of = BTreeMap::new();
        for (name, region) in files {
            let shard = SafeTensors::read(&name, region)?;
            for (tensor, _) in shard.iter() {
                if let Some(other) = shard_of.insert(tensor.to_string(), shards.len()) {
                    let other: &SafeTensors = &shards[other];
                    let why = format!("is in {} too", other.file());
                    return Err(Error::Tensor { file: name, tensor: tensor.into(), why });
                }
            }
            shards.push(shard);
        }
        let checkpoint = Self { config, shards, shard_of, text };
        checkpoint.check_index()?;
        Ok(checkpoint)
    }

    /// Every tensor that the index lists is where it says.
    fn check_index(&self) -> Result<(), Error> {
        let Some(index) = self.text.get(INDEX) else { return Ok(()) };
        for (tensor, file) in weight_map(index.bytes())? {
            let found = self.shard_of.get(&tensor).map(|&s| self.shards[s].file());
            if found != Some(file.as_str()) {
                let why = match found {
                    Some(other) => format!("{INDEX} says it is here, found it in {other}"),
                    None if self.shards.iter().any(|s| s.file() == file) => {
                        format!("{INDEX} says it is here, but it is not")
                    }
                    None => format!("{INDEX} says it is here, but the file is missing"),
                };
                return Err(Error::Tensor { file, tensor, why });
            }
        }
        Ok(())
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.shard_of.iter().filter_map(|(name, &s)| {
            let t = self.shards[s].get(name)?;
            let (dtype, shape, bytes) = (t.dtype, t.shape, t.bytes.len());
            Some(TensorInfo { name, dtype, shape, bytes, file: self.shards[s].file() })
        })
    }

    /// A text file of the checkpoint: `tokenizer.json`, `tokenizer_config.json`, ...
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.text.get(name).map(ByteRegion::bytes)
    }

    /// The matrix `name` as stored: F32, F16, BF16, or FP8 E4M3 with its block scales.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape, a type that is no matrix format, or bad scales.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
        let (shard, t) = self.find(name, &[rows, cols])?;
        let bad = |why: String| tensor_error(shard, name, why);
        if t.shape != [rows, cols] {
            return Err(bad(format!("expected shape [{rows}, {cols}], found {:?}", t.shape)));
        }
        let dtype = match t.dtype {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            "F8_E4M3" => DType::F8E4M3,
            other => return Err(bad(format!("expected F32, F16, BF16 or F8_E4M3, found {other}"))),
        };
        let scales = match dtype {
            DType::F8E4M3 => Some(self.block_scales(name, rows, cols)?),
            _ => None,
        };
        let region = shard.region(name).ok_or_else(|| bad("its bytes are not in the file".into()))?;
        HostMatrix::new(dtype, rows, cols, region, scales).map_err(|e| bad(e.to_string()))
    }

    /// The vector `name` as F32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another length or type, or a value that is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let (shard, t) = self.find(name, &[len])?;
        let bad = |why: String| tensor_error(shard, name, why);
        if t.shape != [len] {
            return Err(bad(format!("expected shape [{len}], found {:?}", t.shape)));
        }
        let values =
            decode(&t).ok_or_else(|| bad(format!("expected F32, F16 or BF16, found {}", t.dtype)))?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(bad(format!("value {i} is {}, expected a finite number", values[i]))),
            None => Ok(values),
        }
    }

    /// `NAME_scale_inv`: a multiplier per 128x128 block, whatever type it is stored in.
    fn block_scales(&self, weight: &str, rows: usize, cols: usize) -> Result<Arc<[f32]>, Error> {
        let name = format!("{weight}_scale_inv");
        let grid = [rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)];
        let (shard, t) = self.find(&name, &grid)?;
        let bad = |why: String| tensor_error(shard, &name, why);
        if t.shape != grid {
            return Err(bad(format!("expected shape {grid:?}, found {:?}", t.shape)));
        }
        let values: Vec<f32> = match t.dtype {
            "F8_E8M0" | "U8" => t.bytes.iter().map(|&b| ue8m0_to_f32(b)).collect(),
            other => decode(&t)
                .ok_or_else(|| bad(format!("expected F32, F16, BF16, F8_E8M0 or U8, found {other}")))?,
        };
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(bad(format!("scale {i} is {}, expected a finite number", values[i]))),
            None => Ok(values.into()),
        }
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<(&SafeTensors, TensorView<'_>), Error> {
        let missing = || {
            let file = match self.shards.as_slice() {
                [only] => only.file().to_string(),
                all => format!("{} files of weights", all.len()),
            };
            let why = format!("is missing, expected shape {expected:?}");
            Error::Tensor { file, tensor: name.into(), why }
        };
        let shard = &self.shards[*self.shard_of.get(name).ok_or_else(missing)?];
        Ok((shard, shard.get(name).ok_or_else(missing)?))
    }
}

fn tensor_error(shard: &SafeTensors, tensor: &str, why: String) -> Error {
    Error::Tensor { file: shard.file().into(), tensor: tensor.into(), why }
}

/// F32, F16 or BF16 values; `None` for any other type.
fn decode(t: &TensorView<'_>) -> Option<Vec<f32>> {
    let halves = || t.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Some(match t.dtype {
        "F32" => t.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        "F16" => halves().map(f16_to_f32).collect(),
        "BF16" => halves().map(bf16_to_f32).collect(),
        _ => return None,
    })
}

fn is_safetensors(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e == "safetensors")
}

fn read_text(path: &Path) -> Result<ByteRegion, Error> {
    let io = |source| Error::Io { path: path.into(), source };
    let meta = fs::metadata(path).map_err(io)?;
    let bad = |why: String| Err(Error::File { file: path.display().to_string(), why });
    if !meta.is_file() {
        return bad("not a regular file".into());
    }
    let mut bytes = Vec::new();
    // Not the size that the system reports: a file may grow, and those of /proc report none.
    File::open(path).map_err(io)?.take(TEXT_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > TEXT_FILE_BYTES_MAX {
        return bad(format!("more than the {TEXT_FILE_BYTES_MAX} bytes allowed"));
    }
    Ok(ByteRegion::from_vec(bytes))
}

/// The names of a folder's weight files, in order.
fn weight_files(folder: &Path, index: Option<&ByteRegion>) -> Result<Vec<String>, Error> {
    if let Some(index) = index {
        let mut files: Vec<String> = weight_map(index.bytes())?.into_values().collect();
        files.sort();
        files.dedup();
        return Ok(files);
    }
    if folder.join(SINGLE).exists() {
        return Ok(vec![SINGLE.into()]);
    }
    let io = |source| Error::Io { path: folder.into(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let found: Vec<String> = names.iter().filter(|n| is_safetensors(n)).cloned().collect();
    match found.len() {
        0 => Err(no_weights(folder, &names)),
        1 => Ok(found),
        n => Err(Error::Folder {
            path: folder.into(),
            why: format!(
                "{n} .safetensors files and no {INDEX}: which tensors belong to the model is unknown"
            ),
        }),
    }
}

fn no_weights(folder: &Path, names: &[String]) -> Error {
    let other =
        |extension: &str| names.iter().find(|n| Path::new(n).extension().is_some_and(|e| e == extension));
    let why = if let Some(name) = other("bin").or(other("pt")).or(other("pth")) {
        format!("{name} is a pickle and is never loaded: convert the weights to safetensors")
    } else if let Some(name) = other("gguf") {
        format!("{name}: GGUF files are not supported: use the safetensors of the model")
    } else {
        format!("no {SINGLE} and no {INDEX}: is this the folder of a Hugging Face checkpoint?")
    };
    Error::Folder { path: PathBuf::from(folder), why }
}

/// Tensor to file name, each a plain name inside the folder.
fn weight_map(index: &[u8]) -> Result<BTreeMap<String, String>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        #[serde(deserialize_with = "json::unique_map")]
        weight_map: BTreeMap<String, String>,
    }
    let bad = |why: String| Error::File { file: INDEX.into(), why };
    if index.len() as u64 > INDEX_BYTES_MAX {
        return Err(bad(format!("{} bytes, at most {INDEX_BYTES_MAX} allowed", index.len())));
    }
    // Derived code would take a list of the fields as well.
    if !index.trim_ascii_start().starts_with(b"{") {
        return Err(bad("expected a JSON object with a weight_map of tensor to file".into()));
    }
    let index: Index = serde_json::from_slice(index)
        .map_err(|e| bad(format!("expected a weight_map of tensor to file: {e}")))?;
    if index.weight_map.is_empty() {
        return Err(bad("weight_map is empty".into()));
    }
    for (tensor, file) in &index.weight_map {
        let plain = Path::new(file).file_name().is_some_and(|n| n.to_string_lossy() == file.as_str());
        if !plain || file.contains(['/', '\\']) || !is_safetensors(file) {
            return Err(bad(format!(
                "tensor {tensor}: {file:?} is not the plain name of a .safetensors file"
            )));
        }
    }
    Ok(index.weight_map)
}

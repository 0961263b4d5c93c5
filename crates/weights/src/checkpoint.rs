//! A checkpoint: configuration, tensors and text files of one model.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use oxseek_tensor::{
    ByteRegion, HostMatrix,
    dtype::{bf16_to_f32, f16_to_f32},
};

use crate::{Error, Gguf, ModelConfig, gguf::parts::models_in, json, mmap, shards::Shards};

pub(crate) const INDEX: &str = "model.safetensors.index.json";
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
    store: Store,
    text: BTreeMap<String, ByteRegion>,
    warnings: Vec<String>,
}

/// Where the tensors are.
#[derive(Debug)]
enum Store {
    Folder(Shards),
    Gguf(Gguf),
}

/// What the headers say of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its name in a Hugging Face checkpoint, less the number of the expert when it holds all of them.
    pub model_name: Cow<'a, str>,
    /// Its type as the file spells it.
    pub dtype: &'a str,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Its bytes.
    pub bytes: usize,
    /// Weights that it holds: none when it holds their scales.
    pub parameters: u64,
    /// The file it is in.
    pub file: &'a str,
}

impl Checkpoint {
    /// Opens a Hugging Face folder, a GGUF file (of a model in parts any one) or a folder with one GGUF model in it.
    /// Weights are mapped, not read.
    ///
    /// # Errors
    /// [`Error`], naming the file and what to do.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let meta = fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
        if meta.is_dir() {
            return Self::open_folder(path);
        }
        if !is(path, "gguf") {
            let why = "expected a folder with config.json and *.safetensors, or a .gguf file".to_string();
            return Err(Error::Folder { path: path.into(), why });
        }
        Self::from_gguf(Gguf::open(path)?)
    }

    fn open_folder(folder: &Path) -> Result<Self, Error> {
        let names = names_in(folder)?;
        if !names.iter().any(|n| n == INDEX || is_safetensors(n)) {
            match models_in(&names).as_slice() {
                [] => {}
                [only] => return Self::from_gguf(Gguf::open(&folder.join(only))?),
                [first, .., last] => {
                    let why = format!("has several models, {first} to {last}: give the path of one");
                    return Err(Error::Folder { path: folder.into(), why });
                }
            }
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
        for name in weight_files(folder, &names, text.get(INDEX))? {
            let path = folder.join(&name);
            if !path.exists() {
                let why = format!("{name} is missing: {INDEX} lists it; is the download complete?");
                return Err(Error::Folder { path: folder.into(), why });
            }
            shards.push((name, mmap::map(&path)?));
        }
        Self::assemble(text, shards)
    }

    /// Takes a checkpoint whose files are in memory already: an embedded model, a browser's download. Either the files
    /// of a Hugging Face folder or the parts of a GGUF model.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_files(files: Vec<(String, ByteRegion)>) -> Result<Self, Error> {
        let mut text = BTreeMap::new();
        let mut shards: Vec<(String, ByteRegion)> = Vec::new();
        let mut parts: Vec<(String, ByteRegion)> = Vec::new();
        for (file, region) in files {
            let weights = match file.as_str() {
                f if is_safetensors(f) => Some(&mut shards),
                f if is(Path::new(f), "gguf") => Some(&mut parts),
                _ => None,
            };
            let twice = match weights {
                Some(list) => {
                    let twice = list.iter().any(|(other, _)| *other == file);
                    list.push((file.clone(), region));
                    twice
                }
                None => text.insert(file.clone(), region).is_some(),
            };
            if twice {
                return Err(Error::File { file, why: "given twice".into() });
            }
        }
        match (shards.is_empty(), parts.is_empty()) {
            (false, true) => Self::assemble(text, shards),
            (true, false) => Self::from_gguf(Gguf::from_files(parts)?),
            (false, false) => {
                Err(Error::File { file: parts.swap_remove(0).0, why: "given beside .safetensors".into() })
            }
            (true, true) => {
                Err(Error::File { file: SINGLE.into(), why: "missing, and no other .safetensors".into() })
            }
        }
    }

    fn assemble(text: BTreeMap<String, ByteRegion>, files: Vec<(String, ByteRegion)>) -> Result<Self, Error> {
        let bytes = |name: &str| text.get(name).map(ByteRegion::bytes);
        let missing = || Error::File { file: CONFIG.into(), why: "missing".into() };
        let config = ModelConfig::parse(bytes(CONFIG).ok_or_else(missing)?, bytes("generation_config.json"))?;
        let store = Store::Folder(Shards::read(files, bytes(INDEX))?);
        Ok(Self { config, store, text, warnings: Vec::new() })
    }

    fn from_gguf(gguf: Gguf) -> Result<Self, Error> {
        let mut warnings = Vec::new();
        let config = gguf.config(&mut warnings)?;
        Ok(Self { config, store: Store::Gguf(gguf), text: BTreeMap::new(), warnings })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The GGUF model, if it is one: its metadata has the tokenizer and the chat template.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.store {
            Store::Folder(_) => None,
            Store::Gguf(gguf) => Some(gguf),
        }
    }

    /// What the files do not say and had to be guessed, for people to read.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        match &self.store {
            Store::Folder(shards) => shards.contains(name),
            Store::Gguf(gguf) => gguf.contains(name),
        }
    }

    /// All tensors as the files have them.
    pub fn tensors(&self) -> Box<dyn Iterator<Item = TensorInfo<'_>> + '_> {
        match &self.store {
            Store::Folder(shards) => Box::new(shards.tensors()),
            Store::Gguf(gguf) => Box::new(gguf.tensors().map(|t| TensorInfo {
                name: t.name,
                model_name: Gguf::model_name(t.name).map_or(t.name.into(), Cow::Owned),
                dtype: t.kind.name(),
                shape: t.shape,
                bytes: t.bytes.len(),
                parameters: t.shape.iter().product::<usize>() as u64,
                file: t.file,
            })),
        }
    }

    /// Bytes of memory that loading takes for weights that cannot be used as they lie in the files.
    pub fn made_bytes(&self) -> u64 {
        match &self.store {
            Store::Folder(_) => 0,
            Store::Gguf(gguf) => gguf.made_bytes(&self.config),
        }
    }

    /// A text file of the checkpoint: `tokenizer.json`, `tokenizer_config.json`, ...
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.text.get(name).map(ByteRegion::bytes)
    }

    /// The matrix `name` as stored; of a GGUF file too by the name that it has in a Hugging Face checkpoint.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape, a type that is no matrix format, or bad scales.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
        match &self.store {
            Store::Folder(shards) => shards.matrix(name, rows, cols),
            Store::Gguf(gguf) => gguf.matrix(&self.config, name, rows, cols),
        }
    }

    /// The `kv_b_proj` `name` of a GGUF file that has it in parts: its key rows, transposed head by head, and its value
    /// rows, as stored.
    ///
    /// # Errors
    /// As [`Checkpoint::matrix`].
    pub fn kv_b_parts(&self, name: &str) -> Result<Option<[HostMatrix; 2]>, Error> {
        match &self.store {
            Store::Folder(_) => Ok(None),
            Store::Gguf(gguf) => gguf.kv_b_parts(&self.config, name),
        }
    }

    /// The vector `name` as F32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another length or type, or a value that is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        match &self.store {
            Store::Folder(shards) => shards.vector(name, len),
            Store::Gguf(gguf) => gguf.vector(name, len),
        }
    }
}

/// F32, F16 or BF16 values; `None` for any other type.
pub(crate) fn decode(dtype: &str, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Some(match dtype {
        "F32" => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        "F16" => halves().map(f16_to_f32).collect(),
        "BF16" => halves().map(bf16_to_f32).collect(),
        _ => return None,
    })
}

fn is_safetensors(name: &str) -> bool {
    is(Path::new(name), "safetensors")
}

fn is(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// The names of a folder's files, in order.
fn names_in(folder: &Path) -> Result<Vec<String>, Error> {
    let io = |source| Error::Io { path: folder.into(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
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
fn weight_files(folder: &Path, names: &[String], index: Option<&ByteRegion>) -> Result<Vec<String>, Error> {
    if let Some(index) = index {
        let mut files: Vec<String> = weight_map(index.bytes())?.into_values().collect();
        files.sort();
        files.dedup();
        return Ok(files);
    }
    if folder.join(SINGLE).exists() {
        return Ok(vec![SINGLE.into()]);
    }
    let found: Vec<String> = names.iter().filter(|n| is_safetensors(n)).cloned().collect();
    match found.len() {
        0 => Err(no_weights(folder, names)),
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
    } else {
        format!("no {SINGLE} and no {INDEX}: is this the folder of a Hugging Face checkpoint?")
    };
    Error::Folder { path: PathBuf::from(folder), why }
}

/// Tensor to file name, each a plain name inside the folder.
pub(crate) fn weight_map(index: &[u8]) -> Result<BTreeMap<String, String>, Error> {
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

//! GGUF: the container of llama.cpp. A model is one file, or several parts called `NAME-00001-of-00003.gguf`.

mod config;
mod describe;
mod kinds;
mod latent;
mod layout;
mod names;
pub(crate) mod parts;
mod reader;
mod value;
mod writer;

use std::{collections::HashMap, path::Path};

use oxseek_tensor::{ByteRegion, HostMatrix};

pub use self::{
    describe::describe,
    kinds::GgmlType,
    layout::{Slot, Source, layout},
    value::{Array, Value, ValueKind},
    writer::{GgufBody, GgufWriter},
};
use self::{
    names::{Place, place},
    reader::{Entry, Part},
};
use crate::{Error, ModelConfig, checkpoint::decode};

/// A GGUF model: its metadata and the tensors of all its parts.
#[derive(Debug)]
pub struct Gguf {
    /// The first has the metadata.
    parts: Vec<Part>,
    /// Tensor to part.
    part_of: HashMap<String, usize>,
}

/// What a GGUF file says of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct GgufTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// How its numbers are stored.
    pub kind: GgmlType,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Its bytes, row-major, of any alignment.
    pub bytes: &'a [u8],
    /// The file it is in.
    pub file: &'a str,
}

impl Gguf {
    /// Opens a model by any of its parts; weights are mapped, not read.
    ///
    /// # Errors
    /// [`Error`], naming the file and the key or tensor.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::from_files(parts::map_all(path)?)
    }

    /// Takes a model whose parts are in memory, in any order.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_files(files: Vec<(String, ByteRegion)>) -> Result<Self, Error> {
        if files.is_empty() {
            return Err(Error::File { file: "*.gguf".into(), why: "no file is given".into() });
        }
        let parts: Result<Vec<_>, Error> =
            files.into_iter().map(|(name, region)| Part::read(&name, region)).collect();
        let parts = parts::in_order(parts?)?;
        let mut part_of = HashMap::new();
        for (i, part) in parts.iter().enumerate() {
            for name in part.tensors.keys() {
                if let Some(other) = part_of.insert(name.clone(), i) {
                    let other: &Part = &parts[other];
                    let why = format!("is in {} too", other.file);
                    return Err(Error::Tensor { file: part.file.clone(), tensor: name.clone(), why });
                }
            }
        }
        let model = Self { parts, part_of };
        parts::check_count(&model)?;
        Ok(model)
    }

    /// Name of the file, or of the first part.
    pub fn file(&self) -> &str {
        self.parts.first().map_or("", |p| &p.file)
    }

    /// The metadata value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.parts.first()?.metadata.get(key)
    }

    /// All metadata by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.parts.first().into_iter().flat_map(|p| &p.metadata).map(|(k, v)| (k.as_str(), v))
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let (part, entry) = self.entry(name)?;
        let (name, _) = part.tensors.get_key_value(name)?;
        Some(view(part, name, entry))
    }

    /// All tensors, part by part, by name.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.parts.iter().flat_map(|p| p.tensors.iter().map(move |(name, e)| view(p, name, e)))
    }

    /// The tensor `name` as a matrix, its outer sizes taken together; a vector is one row.
    ///
    /// # Errors
    /// [`Error::Tensor`] when there is none, or its type is one that cannot be read.
    pub fn rows_of(&self, name: &str) -> Result<HostMatrix, Error> {
        let (_, entry) = self.entry(name).ok_or_else(|| self.missing(name, &[]))?;
        let cols = entry.shape.last().copied().unwrap_or(1);
        let rows = entry.shape.iter().rev().skip(1).product();
        self.slab(name, &entry.shape, 0, (rows, cols))
    }

    /// What the model calls a tensor of the file: its name in a Hugging Face checkpoint, as far as there is one.
    pub(crate) fn model_name(name: &str) -> Option<String> {
        names::model_name(name)
    }

    /// The model that the metadata describes. What had to be guessed goes to `warnings`.
    pub(crate) fn config(&self, warnings: &mut Vec<String>) -> Result<ModelConfig, Error> {
        config::model_config(self, warnings)
    }

    /// The matrix that a Hugging Face checkpoint calls `name`.
    pub(crate) fn matrix(
        &self,
        config: &ModelConfig,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<HostMatrix, Error> {
        match place(name) {
            Place::Whole(name) => self.slab(&name, &[rows, cols], 0, (rows, cols)),
            Place::Expert { layer, kind, expert } => self.expert(config, layer, kind, expert, (rows, cols)),
            Place::Latent { layer } => latent::matrix(self, config, layer, (rows, cols)),
        }
    }

    /// The two parts of the `kv_b_proj` that a Hugging Face checkpoint calls `name`, where the file has no whole.
    pub(crate) fn kv_b_parts(
        &self,
        config: &ModelConfig,
        name: &str,
    ) -> Result<Option<[HostMatrix; 2]>, Error> {
        match place(name) {
            Place::Latent { layer } => latent::parts(self, config, layer),
            _ => Ok(None),
        }
    }

    /// The vector that a Hugging Face checkpoint calls `name`.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let Place::Whole(name) = place(name) else {
            return Err(self.missing(name, &[len]));
        };
        let (part, entry) = self.shaped(&name, &[len])?;
        let bad = |why: String| tensor_error(part, &name, why);
        let values = decode(entry.kind.name(), part.bytes(entry))
            .ok_or_else(|| bad(format!("expected F32, F16 or BF16, found {}", entry.kind.name())))?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(bad(format!("value {i} is {}, expected a finite number", values[i]))),
            None => Ok(values),
        }
    }

    /// Whether there is what a Hugging Face checkpoint calls `name`.
    pub(crate) fn contains(&self, name: &str) -> bool {
        let has = |name: String| self.has(&name);
        match place(name) {
            Place::Whole(name) => has(name),
            Place::Expert { layer, kind, .. } => {
                has(names::stack(layer, kind)) || kind != "down" && has(names::fused_stack(layer))
            }
            Place::Latent { layer } => has(names::kv_b(layer)) || has(names::k_b(layer)),
        }
    }

    /// Bytes of memory that [`Gguf::matrix`] takes for weights that cannot stay as the file has them.
    pub(crate) fn made_bytes(&self, config: &ModelConfig) -> u64 {
        latent::joined_bytes(self, config)
    }

    /// One expert's matrix out of the stack of all, without copying.
    fn expert(
        &self,
        config: &ModelConfig,
        layer: &str,
        kind: &str,
        expert: usize,
        (rows, cols): (usize, usize),
    ) -> Result<HostMatrix, Error> {
        let experts = config.n_routed_experts;
        if expert >= experts {
            return Err(self.missing(&format!("expert {expert} of blk.{layer}"), &[rows, cols]));
        }
        let fused = names::fused_stack(layer);
        if kind != "down" && !self.has(&names::stack(layer, kind)) && self.has(&fused) {
            // The gate's rows, then those of up.
            let first = 2 * rows * expert + if kind == "up" { rows } else { 0 };
            return self.slab(&fused, &[experts, 2 * rows, cols], first, (rows, cols));
        }
        self.slab(&names::stack(layer, kind), &[experts, rows, cols], rows * expert, (rows, cols))
    }

    /// `rows` rows from `first` on of a tensor of this shape.
    fn slab(
        &self,
        name: &str,
        shape: &[usize],
        first: usize,
        (rows, cols): (usize, usize),
    ) -> Result<HostMatrix, Error> {
        let (part, entry) = self.shaped(name, shape)?;
        let bad = |why: String| tensor_error(part, name, why);
        let dtype = entry
            .kind
            .dtype()
            .ok_or_else(|| bad(format!("its type, {}, is not supported", entry.kind.name())))?;
        let range = dtype.row_bytes(cols).and_then(|row| {
            let start = first.checked_mul(row)?;
            Some(start..start.checked_add(rows.checked_mul(row)?)?)
        });
        let region = range.and_then(|range| part.region(entry, range));
        let region = region.ok_or_else(|| bad("its bytes are not in the file".into()))?;
        HostMatrix::new(dtype, rows, cols, region, None).map_err(|e| bad(e.to_string()))
    }

    /// The tensor `name`, its shape proven. Files leave out outer sizes of 1.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<(&Part, &Entry), Error> {
        let (part, entry) = self.entry(name).ok_or_else(|| self.missing(name, shape))?;
        let inner = |s: &[usize]| s.iter().skip_while(|&&n| n == 1).copied().collect::<Vec<_>>();
        if inner(shape) != inner(&entry.shape) {
            let why = format!("expected shape {shape:?}, found {:?}", entry.shape);
            return Err(tensor_error(part, name, why));
        }
        Ok((part, entry))
    }

    fn has(&self, name: &str) -> bool {
        self.part_of.contains_key(name)
    }

    fn entry(&self, name: &str) -> Option<(&Part, &Entry)> {
        let part = &self.parts[*self.part_of.get(name)?];
        Some((part, part.tensors.get(name)?))
    }

    fn missing(&self, name: &str, shape: &[usize]) -> Error {
        let file = match self.parts.as_slice() {
            [only] => only.file.clone(),
            all => format!("{} and its {} other parts", self.file(), all.len().saturating_sub(1)),
        };
        Error::Tensor { file, tensor: name.into(), why: format!("is missing, expected shape {shape:?}") }
    }

    fn key_error(&self, key: &str, why: String) -> Error {
        Error::Key { file: self.file().into(), key: key.into(), why }
    }
}

fn view<'a>(part: &'a Part, name: &'a str, entry: &'a Entry) -> GgufTensor<'a> {
    GgufTensor { name, kind: entry.kind, shape: &entry.shape, bytes: part.bytes(entry), file: &part.file }
}

fn tensor_error(part: &Part, tensor: &str, why: String) -> Error {
    Error::Tensor { file: part.file.clone(), tensor: tensor.into(), why }
}

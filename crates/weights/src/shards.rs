//! The tensors of a Hugging Face checkpoint: one safetensors file or several, and the index that says which is where.

use std::{collections::BTreeMap, sync::Arc};

use oxseek_tensor::{
    ByteRegion, DType, HostMatrix,
    dtype::{FP8_BLOCK, ue8m0_to_f32},
};

use crate::{
    Error, SafeTensors, TensorView,
    checkpoint::{INDEX, TensorInfo, decode, weight_map},
};

/// The weights of a folder.
#[derive(Debug)]
pub(crate) struct Shards {
    shards: Vec<SafeTensors>,
    /// Tensor to shard.
    shard_of: BTreeMap<String, usize>,
}

impl Shards {
    /// Reads the headers; `index` is the bytes of the index, where there is one.
    pub(crate) fn read(files: Vec<(String, ByteRegion)>, index: Option<&[u8]>) -> Result<Self, Error> {
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
        let read = Self { shards, shard_of };
        read.check_index(index)?;
        Ok(read)
    }

    /// Every tensor that the index lists is where it says.
    fn check_index(&self, index: Option<&[u8]>) -> Result<(), Error> {
        let Some(index) = index else { return Ok(()) };
        for (tensor, file) in weight_map(index)? {
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

    /// Whether there is a tensor `name`, packed or not.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name) || self.shard_of.contains_key(&format!("{name}_packed"))
    }

    /// All tensors by name.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.shard_of.iter().filter_map(|(name, &s)| {
            let t = self.shards[s].get(name)?;
            let elements = t.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
            let parameters = match name {
                n if ["_scale_inv", ".weight_scale", ".weight_shape"].iter().any(|end| n.ends_with(end)) => 0,
                n if n.ends_with(".weight_packed") => elements.saturating_mul(8),
                _ => elements,
            };
            let (bytes, file) = (t.bytes.len(), self.shards[s].file());
            let (dtype, shape) = (t.dtype, t.shape);
            Some(TensorInfo { name, model_name: name.into(), dtype, shape, bytes, parameters, file })
        })
    }

    /// The matrix `name` as stored: F32, F16, BF16, FP8 E4M3 with its block scales, or INT4 in three tensors.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape, a type that is no matrix format, or bad scales.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
        if self.shard_of.contains_key(&format!("{name}_packed")) {
            return self.packed_matrix(name, rows, cols);
        }
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

    /// INT4 as compressed-tensors packs it: `NAME_packed` has eight columns a word, `NAME_scale` a BF16 per 32 columns,
    /// `NAME_shape` the shape.
    fn packed_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
        let (packed, scale, shape) =
            (format!("{name}_packed"), format!("{name}_scale"), format!("{name}_shape"));
        self.check_shape(&shape, rows, cols)?;
        let group = DType::INT4.block_len();
        if !cols.is_multiple_of(group) {
            let (shard, _) = self.find(&shape, &[2])?;
            let why = format!("{cols} columns are no whole number of groups of {group}");
            return Err(tensor_error(shard, &shape, why));
        }
        let codes = self.region_of(&packed, "I32", [rows, cols / 8])?;
        let scales = self.region_of(&scale, "BF16", [rows, cols / group])?;
        let (shard, _) = self.find(&packed, &[rows, cols / 8])?;
        HostMatrix::int4(rows, cols, codes, scales).map_err(|e| tensor_error(shard, &packed, e.to_string()))
    }

    /// A tensor that holds the shape of another one.
    fn check_shape(&self, name: &str, rows: usize, cols: usize) -> Result<(), Error> {
        let (shard, t) = self.find(name, &[2])?;
        let bad = |why: String| Err(tensor_error(shard, name, why));
        if t.shape != [2] {
            return bad(format!("expected shape [2], found {:?}", t.shape));
        }
        let found: Vec<i64> = match t.dtype {
            "I32" => t.bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
            "I64" => t.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            other => return bad(format!("expected I32 or I64, found {other}")),
        };
        if found != [rows as i64, cols as i64] {
            return bad(format!("expected [{rows}, {cols}], found {found:?}"));
        }
        Ok(())
    }

    /// The bytes of a tensor of this type and shape.
    fn region_of(&self, name: &str, dtype: &str, shape: [usize; 2]) -> Result<ByteRegion, Error> {
        let (shard, t) = self.find(name, &shape)?;
        let bad = |why: String| tensor_error(shard, name, why);
        if t.dtype != dtype {
            return Err(bad(format!("expected {dtype}, found {}", t.dtype)));
        }
        if t.shape != shape {
            return Err(bad(format!("expected shape {shape:?}, found {:?}", t.shape)));
        }
        shard.region(name).ok_or_else(|| bad("its bytes are not in the file".into()))
    }

    /// The vector `name` as F32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another length or type, or a value that is not finite.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let (shard, t) = self.find(name, &[len])?;
        let bad = |why: String| tensor_error(shard, name, why);
        if t.shape != [len] {
            return Err(bad(format!("expected shape [{len}], found {:?}", t.shape)));
        }
        let values = decode(t.dtype, t.bytes)
            .ok_or_else(|| bad(format!("expected F32, F16 or BF16, found {}", t.dtype)))?;
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
            other => decode(t.dtype, t.bytes)
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

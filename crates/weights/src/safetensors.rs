//! The safetensors container (deepseek.md section 4.1): a JSON header of names, types, shapes and byte ranges, then
//! the bytes. Everything the header claims is proven against the real file before any tensor can be taken.

use std::{collections::BTreeMap, fmt, ops::Range};

use oxseek_tensor::ByteRegion;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use crate::Error;

/// Largest header that is read. The format's own limit.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;

/// A safetensors file whose header holds.
#[derive(Debug)]
pub struct SafeTensors {
    file: String,
    region: ByteRegion,
    tensors: BTreeMap<String, Entry>,
}

/// One tensor of a file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The type as the file spells it: `F32`, `BF16`, `F8_E4M3`, ...
    pub dtype: &'a str,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Its bytes, little-endian, row-major, of any alignment.
    pub bytes: &'a [u8],
}

#[derive(Debug)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// In the file.
    range: Range<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Header entries in file order, so that a name that occurs twice is seen.
struct RawHeader(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl SafeTensors {
    /// Reads the header of `region`, the whole of a file called `file`.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Tensor`], with what was expected and what was found.
    pub fn read(file: &str, region: ByteRegion) -> Result<Self, Error> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let (header, data_start) = header_bytes(region.bytes()).map_err(bad)?;
        let text = std::str::from_utf8(header).map_err(|e| bad(format!("header is not UTF-8: {e}")))?;
        let raw: RawHeader = serde_json::from_str(text)
            .map_err(|e| bad(format!("header is not a JSON object of tensors: {e}")))?;
        let data_len = region.bytes().len() - data_start;
        let mut tensors = BTreeMap::new();
        for (name, value) in raw.0 {
            if name == "__metadata__" {
                continue;
            }
            let bad = |why: String| Error::Tensor { file: file.into(), tensor: name.clone(), why };
            let entry = entry(value, data_start, data_len).map_err(bad)?;
            if tensors.contains_key(&name) {
                return Err(bad("is in the header twice".into()));
            }
            tensors.insert(name, entry);
        }
        let tensors = Self { file: file.into(), region, tensors };
        tensors.check_coverage(data_start)?;
        Ok(tensors)
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The tensor `name`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|e| self.view(e))
    }

    /// The tensor's bytes as a region that keeps the file alive.
    pub fn region(&self, name: &str) -> Option<ByteRegion> {
        self.region.slice(self.tensors.get(name)?.range.clone())
    }

    /// All tensors by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, TensorView<'_>)> {
        self.tensors.iter().map(|(n, e)| (n.as_str(), self.view(e)))
    }

    fn view<'a>(&'a self, e: &'a Entry) -> TensorView<'a> {
        TensorView { dtype: &e.dtype, shape: &e.shape, bytes: &self.region.bytes()[e.range.clone()] }
    }

    /// The data is exactly its tensors: none overlap, no bytes between or after them.
    fn check_coverage(&self, data_start: usize) -> Result<(), Error> {
        let mut by_offset: Vec<(&String, &Entry)> = self.tensors.iter().collect();
        by_offset.sort_by_key(|(_, e)| (e.range.start, e.range.end));
        let mut end = data_start;
        for (name, e) in by_offset {
            if e.range.start != end {
                let what = if e.range.start < end {
                    "overlaps the tensor before it"
                } else {
                    "leaves a gap before it"
                };
                return Err(Error::Tensor {
                    file: self.file.clone(),
                    tensor: name.clone(),
                    why: format!("{what}: begins at byte {}, expected {end}", e.range.start),
                });
            }
            end = e.range.end;
        }
        let len = self.region.bytes().len();
        if end == len {
            return Ok(());
        }
        Err(Error::File {
            file: self.file.clone(),
            why: format!("{} bytes after the last tensor", len - end),
        })
    }
}

/// The header's bytes and where the data begins.
fn header_bytes(bytes: &[u8]) -> Result<(&[u8], usize), String> {
    let Some(length) = bytes.first_chunk::<8>() else {
        return Err(format!("truncated: {} bytes, a safetensors file has at least 8", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(format!(
            "header of {length} bytes, at most {HEADER_BYTES_MAX} allowed: not a safetensors file?"
        ));
    }
    let end = 8 + length as usize;
    match bytes.get(8..end) {
        Some(header) => Ok((header, end)),
        None => Err(format!("truncated: the header ends at byte {end}, the file at {}", bytes.len())),
    }
}

fn entry(value: serde_json::Value, data_start: usize, data_len: usize) -> Result<Entry, String> {
    let raw: RawEntry =
        serde_json::from_value(value).map_err(|e| format!("expected dtype, shape and data_offsets: {e}"))?;
    let element_bytes = dtype_bytes(&raw.dtype).ok_or_else(|| format!("unknown dtype {:?}", raw.dtype))?;
    if raw.shape.len() > DIMENSIONS_MAX {
        return Err(format!("{} dimensions, at most {DIMENSIONS_MAX} allowed", raw.shape.len()));
    }
    let expected = raw.shape.iter().try_fold(element_bytes, |n, &d| n.checked_mul(d));
    let expected = expected.ok_or_else(|| format!("shape {:?} overflows", raw.shape))?;
    let (begin, end) = raw.data_offsets;
    if begin > end {
        return Err(format!("data_offsets [{begin}, {end}] run backwards"));
    }
    if end - begin != expected {
        let (dtype, shape) = (&raw.dtype, &raw.shape);
        return Err(format!(
            "{dtype} of shape {shape:?} takes {expected} bytes, data_offsets hold {}",
            end - begin
        ));
    }
    if end > data_len as u64 {
        return Err(format!("truncated: its data ends at byte {end} of the data, the file has {data_len}"));
    }
    let shape = raw.shape.iter().map(|&d| d as usize).collect();
    Ok(Entry { dtype: raw.dtype, shape, range: data_start + begin as usize..data_start + end as usize })
}

fn dtype_bytes(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "I8" | "U8" | "BOOL" => 1,
        _ => return None,
    })
}

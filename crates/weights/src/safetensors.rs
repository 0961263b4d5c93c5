//! The safetensors container: a JSON header of names, types, shapes and byte ranges, then
//! the bytes. Everything the header claims is proven against the real file before any tensor can be taken.

use std::{collections::BTreeMap, fmt, ops::Range};

use oxseek_tensor::ByteRegion;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::Error;

/// Largest header that is read. The format's own limit.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 8;
/// The entry that is no tensor: free text about the file.
const METADATA: &str = "__metadata__";

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
    dtype: &'static str,
    shape: Vec<usize>,
    /// In the file.
    range: Range<usize>,
}

/// An entry as the header spells it.
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Derived code would take a list of the three as well.
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = RawEntry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
                let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
                while let Some(key) = map.next_key::<String>()? {
                    let twice = match key.as_str() {
                        "dtype" => dtype.replace(map.next_value()?).is_some(),
                        "shape" => shape.replace(map.next_value::<Shape>()?.0).is_some(),
                        "data_offsets" => data_offsets.replace(map.next_value()?).is_some(),
                        other => return Err(A::Error::custom(format_args!("unknown field {other:?}"))),
                    };
                    if twice {
                        return Err(A::Error::custom(format_args!("{key:?} occurs twice")));
                    }
                }
                let missing = |field| A::Error::custom(format_args!("{field} is missing"));
                Ok(RawEntry {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    data_offsets: data_offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_map(EntryVisitor)
    }
}

/// Sizes, outermost first. Counted while they are read, so that a header full of them takes no memory.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = seq.next_element()? {
                    if sizes.len() == DIMENSIONS_MAX {
                        let why = format_args!("more than {DIMENSIONS_MAX} dimensions");
                        return Err(A::Error::custom(why));
                    }
                    sizes.push(size);
                }
                Ok(Shape(sizes))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}

/// Reads header entries in file order, so that a name that occurs twice is seen.
struct Entries<'a> {
    /// The tensor whose entry is being read, for the error.
    reading: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = Vec<(String, RawEntry)>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = Vec<(String, RawEntry)>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            *self.reading = Some(name.clone());
            entries.push((name, map.next_value()?));
            *self.reading = None;
        }
        Ok(entries)
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
        let mut reading = None;
        let mut json = serde_json::Deserializer::from_str(text);
        let entries = Entries { reading: &mut reading }.deserialize(&mut json);
        let raw = entries.and_then(|raw| json.end().map(|()| raw)).map_err(|e| match reading {
            None => bad(format!("header is not a JSON object of tensors: {e}")),
            Some(tensor) => {
                let why = format!("expected dtype, shape and data_offsets: {e}");
                Error::Tensor { file: file.into(), tensor, why }
            }
        })?;
        let data_len = region.bytes().len() - data_start;
        let mut tensors = BTreeMap::new();
        for (name, raw) in raw {
            let bad = |why: String| Error::Tensor { file: file.into(), tensor: name.clone(), why };
            let entry = entry(&raw, data_start, data_len).map_err(bad)?;
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
        TensorView { dtype: e.dtype, shape: &e.shape, bytes: &self.region.bytes()[e.range.clone()] }
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

fn entry(raw: &RawEntry, data_start: usize, data_len: usize) -> Result<Entry, String> {
    let Some((dtype, element_bytes)) = DTYPES.into_iter().find(|(name, _)| *name == raw.dtype) else {
        let known = DTYPES.map(|(name, _)| name).join(", ");
        return Err(format!("unknown dtype {:?}, expected one of {known}", raw.dtype));
    };
    let expected = raw.shape.iter().try_fold(element_bytes, |n, &d| n.checked_mul(d));
    let expected = expected.ok_or_else(|| format!("shape {:?} overflows", raw.shape))?;
    let (begin, end) = raw.data_offsets;
    if begin > end {
        return Err(format!("data_offsets [{begin}, {end}] run backwards"));
    }
    if end - begin != expected {
        return Err(format!(
            "{dtype} of shape {:?} takes {expected} bytes, data_offsets hold {}",
            raw.shape,
            end - begin
        ));
    }
    if end > data_len as u64 {
        return Err(format!("truncated: its data ends at byte {end} of the data, the file has {data_len}"));
    }
    // A tensor without bytes may still have a size that a 32-bit machine cannot count.
    let shape = raw.shape.iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>();
    let shape = shape.map_err(|_| format!("shape {:?} overflows", raw.shape))?;
    Ok(Entry { dtype, shape, range: data_start + begin as usize..data_start + end as usize })
}

/// The types and the bytes of one element.
const DTYPES: [(&str, u64); 16] = [
    ("F64", 8),
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
    ("I64", 8),
    ("I32", 4),
    ("I16", 2),
    ("I8", 1),
    ("U64", 8),
    ("U32", 4),
    ("U16", 2),
    ("U8", 1),
    ("BOOL", 1),
];

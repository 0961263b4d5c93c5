//! One GGUF file: metadata, then what tensors there are, then their bytes. Everything that the head claims is proven
//! against the real file before any tensor can be taken.

use std::{collections::BTreeMap, ops::Range};

use oxseek_tensor::ByteRegion;

use super::{
    kinds::GgmlType,
    value::{Array, Value, ValueKind},
};
use crate::Error;

/// What a file begins with.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Where the file says how its tensors are aligned.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
pub(super) const ALIGNMENT_DEFAULT: usize = 32;
/// Largest alignment: that of a large page.
pub(super) const ALIGNMENT_MAX: usize = 1 << 21;
/// Most metadata entries. Real files have less than a hundred.
const KEYS_MAX: u64 = 1 << 16;
/// Most tensors of a file: a hundred times those of the largest model there is.
const TENSORS_MAX: u64 = 1 << 17;
/// Longest key, the format's own limit.
const KEY_BYTES_MAX: u64 = 65_535;
const TENSOR_NAME_BYTES_MAX: u64 = 1024;
/// Longest text: chat templates take a few kilobytes.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// Most elements of a list: sixteen times the largest vocabulary.
const ARRAY_LEN_MAX: u64 = 1 << 22;
/// Most dimensions of a tensor, the format's own limit.
pub(super) const DIMENSIONS_MAX: usize = 4;

/// A file whose head holds.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: String,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Entry>,
    region: ByteRegion,
}

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: GgmlType,
    /// Outermost first, unlike the file.
    pub(super) shape: Vec<usize>,
    /// In the file.
    pub(super) range: Range<usize>,
}

/// A tensor as the head spells it.
struct RawEntry {
    name: String,
    kind: GgmlType,
    shape: Vec<usize>,
    /// From where the data begins.
    offset: u64,
}

impl Part {
    /// Reads the head of `region`, the whole of a file called `file`.
    pub(super) fn read(file: &str, region: ByteRegion) -> Result<Self, Error> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let mut c = Cursor { file, region: &region, at: 0 };
        let (tensors, keys) = c.counts().map_err(bad)?;
        let metadata = c.metadata(keys)?;
        let raw = c.tensors(tensors)?;
        let alignment = alignment(file, &metadata)?;
        // A file without tensors may end right behind its head.
        let data_start = c.at.next_multiple_of(alignment).min(region.bytes().len());
        let mut entries = BTreeMap::new();
        for raw in raw {
            let bad = |why: String| Error::Tensor { file: file.into(), tensor: raw.name.clone(), why };
            let entry = raw.proven(data_start, region.bytes().len(), alignment).map_err(bad)?;
            if entries.contains_key(&raw.name) {
                return Err(bad("is in the file twice".into()));
            }
            entries.insert(raw.name, entry);
        }
        let part = Self { file: file.into(), metadata, tensors: entries, region };
        part.check_overlap()?;
        Ok(part)
    }

    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.region.bytes()[entry.range.clone()]
    }

    /// Bytes `within` of a tensor as a region that keeps the file alive; `None` when they are not in the tensor.
    pub(super) fn region(&self, entry: &Entry, within: Range<usize>) -> Option<ByteRegion> {
        self.region.slice(entry.range.clone())?.slice(within)
    }

    /// No tensor shares bytes with another. Gaps are padding and may hold anything.
    fn check_overlap(&self) -> Result<(), Error> {
        let mut by_offset: Vec<(&String, &Entry)> = self.tensors.iter().collect();
        by_offset.sort_by_key(|(_, e)| (e.range.start, e.range.end));
        for pair in by_offset.windows(2) {
            let [(other, before), (name, e)] = pair else { continue };
            if e.range.start < before.range.end {
                let (start, end) = (e.range.start, before.range.end);
                let why = format!("begins at byte {start}, inside of {other}, which ends at byte {end}");
                return Err(Error::Tensor { file: self.file.clone(), tensor: (*name).clone(), why });
            }
        }
        Ok(())
    }
}

fn alignment(file: &str, metadata: &BTreeMap<String, Value>) -> Result<usize, Error> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(ALIGNMENT_DEFAULT) };
    match value.as_i64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) if n.is_power_of_two() && n <= ALIGNMENT_MAX => Ok(n),
        _ => {
            let why = format!("expected a power of two, at most {ALIGNMENT_MAX}, found {}", value.brief());
            Err(Error::Key { file: file.into(), key: ALIGNMENT_KEY.into(), why })
        }
    }
}

impl RawEntry {
    fn proven(&self, data_start: usize, file_len: usize, alignment: usize) -> Result<Entry, String> {
        let (kind, shape) = (self.kind, &self.shape);
        let overflow = || format!("shape {shape:?} overflows");
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(kind.block_len()) {
            let (name, block) = (kind.name(), kind.block_len());
            return Err(format!("rows of {columns} values are no whole number of {name} blocks of {block}"));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
        let bytes = (elements / kind.block_len()).checked_mul(kind.block_bytes()).ok_or_else(overflow)?;
        if !self.offset.is_multiple_of(alignment as u64) {
            return Err(format!("offset {} is no multiple of the alignment, {alignment}", self.offset));
        }
        let data_len = file_len - data_start;
        let end = usize::try_from(self.offset).ok().and_then(|o| o.checked_add(bytes));
        match end {
            Some(end) if end <= data_len => {
                let start = data_start + end - bytes;
                Ok(Entry { kind, shape: shape.clone(), range: start..start + bytes })
            }
            _ => Err(format!(
                "truncated: {} of shape {shape:?} takes {bytes} bytes from offset {} of the data, which has {data_len}",
                kind.name(),
                self.offset
            )),
        }
    }
}

/// Where we are in a file.
struct Cursor<'a> {
    file: &'a str,
    region: &'a ByteRegion,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Magic, version, number of tensors, number of metadata entries.
    fn counts(&mut self) -> Result<(u64, u64), String> {
        let magic = self.take(4, "the magic")?;
        if magic != MAGIC {
            return Err(format!("begins with {:?}, expected \"GGUF\"", magic.escape_ascii().to_string()));
        }
        match self.u32("the version")? {
            2 | 3 => {}
            1 => return Err("version 1, supported are 2 and 3: convert the model anew".into()),
            n if (1..=3).contains(&n.swap_bytes()) => {
                return Err("the file is big-endian, supported is little-endian".into());
            }
            n => return Err(format!("version {n}, supported are 2 and 3")),
        }
        let (tensors, keys) = (self.u64("the number of tensors")?, self.u64("the number of keys")?);
        for (n, max, what) in [(tensors, TENSORS_MAX, "tensors"), (keys, KEYS_MAX, "keys")] {
            if n > max {
                return Err(format!("{n} {what}, at most {max} are allowed"));
            }
        }
        Ok((tensors, keys))
    }

    fn metadata(&mut self, keys: u64) -> Result<BTreeMap<String, Value>, Error> {
        let mut metadata = BTreeMap::new();
        for i in 0..keys {
            let at = self.at;
            let key = self.text(KEY_BYTES_MAX, "its key").map_err(|why| Error::File {
                file: self.file.into(),
                why: format!("metadata entry {i} of {keys} at byte {at}: {why}"),
            })?;
            let bad = |why: String| Error::Key { file: self.file.into(), key: key.into(), why };
            let value = self.value().map_err(bad)?;
            let bad = |why: String| Error::Key { file: self.file.into(), key: key.into(), why };
            if metadata.contains_key(key) {
                return Err(bad("is in the file twice".into()));
            }
            metadata.insert(key.to_string(), value);
        }
        Ok(metadata)
    }

    fn value(&mut self) -> Result<Value, String> {
        let kind = self.kind()?;
        let what = "its value";
        Ok(match kind {
            ValueKind::U8 => Value::U8(self.array::<1>(what)?[0]),
            ValueKind::I8 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            ValueKind::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            ValueKind::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            ValueKind::U32 => Value::U32(self.u32(what)?),
            ValueKind::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            ValueKind::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueKind::Bool => match self.array::<1>(what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                n => return Err(format!("expected a bool, 0 or 1, found {n}")),
            },
            ValueKind::Text => Value::Text(self.text(TEXT_BYTES_MAX, what)?.to_string()),
            ValueKind::Array => Value::Array(self.list()?),
            ValueKind::U64 => Value::U64(self.u64(what)?),
            ValueKind::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            ValueKind::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
        })
    }

    fn list(&mut self) -> Result<Array, String> {
        let kind = self.kind()?;
        let len = self.u64("the length of its list")?;
        if len > ARRAY_LEN_MAX {
            return Err(format!("a list of {len} elements, at most {ARRAY_LEN_MAX} are allowed"));
        }
        let start = self.at;
        match kind.bytes() {
            Some(bytes) => {
                self.take(len * bytes as u64, "its list")?;
            }
            None if kind == ValueKind::Text => {
                for i in 0..len {
                    self.text(TEXT_BYTES_MAX, "a text of its list")
                        .map_err(|e| format!("element {i}: {e}"))?;
                }
            }
            None => return Err("lists in lists are not supported".into()),
        }
        let bytes = self.region.slice(start..self.at).ok_or("its list is not in the file")?;
        Ok(Array { kind, len: len as usize, bytes })
    }

    fn kind(&mut self) -> Result<ValueKind, String> {
        let code = self.u32("its type")?;
        ValueKind::from_code(code).ok_or_else(|| format!("value type {code}, expected 0 to 12"))
    }

    fn tensors(&mut self, tensors: u64) -> Result<Vec<RawEntry>, Error> {
        let mut entries = Vec::new();
        for i in 0..tensors {
            let at = self.at;
            let name = self.text(TENSOR_NAME_BYTES_MAX, "its name").map_err(|why| Error::File {
                file: self.file.into(),
                why: format!("tensor {i} of {tensors} at byte {at}: {why}"),
            })?;
            let entry = self.tensor(name).map_err(|why| Error::Tensor {
                file: self.file.into(),
                tensor: name.into(),
                why,
            })?;
            entries.push(entry);
        }
        Ok(entries)
    }

    fn tensor(&mut self, name: &str) -> Result<RawEntry, String> {
        let dimensions = self.u32("its number of dimensions")? as usize;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(format!("{dimensions} dimensions, expected 1 to {DIMENSIONS_MAX}"));
        }
        let mut shape = Vec::with_capacity(dimensions);
        for _ in 0..dimensions {
            let size = self.u64("its sizes")?;
            match usize::try_from(size) {
                Ok(n) if n > 0 => shape.push(n),
                _ => return Err(format!("a dimension of {size} elements")),
            }
        }
        // The file has the innermost first.
        shape.reverse();
        let code = self.u32("its type")?;
        let kind = GgmlType::from_code(code).ok_or_else(|| format!("unknown tensor type {code}"))?;
        Ok(RawEntry { name: name.into(), kind, shape, offset: self.u64("its offset")? })
    }

    fn text(&mut self, bytes_max: u64, what: &str) -> Result<&'a str, String> {
        let len = self.u64(what)?;
        if len > bytes_max {
            return Err(format!("{what} takes {len} bytes, at most {bytes_max} are allowed"));
        }
        std::str::from_utf8(self.take(len, what)?).map_err(|e| format!("{what} is not UTF-8: {e}"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| format!("truncated: {what}"))
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], String> {
        let rest = &self.region.bytes()[self.at..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(bytes) => {
                self.at += bytes.len();
                Ok(bytes)
            }
            None => Err(format!(
                "truncated: {what} takes {len} bytes at byte {}, the file has {}",
                self.at,
                self.region.bytes().len()
            )),
        }
    }
}

//! Metadata values and their types.

use oxseek_tensor::ByteRegion;

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is what it is called")]
pub enum ValueKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl ValueKind {
    /// Every kind; its place is its code in a file.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    pub(super) fn code(self) -> u32 {
        self as u32
    }

    /// Bytes of a value; `None` when they differ from value to value.
    pub(super) fn bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }

    /// The name that the format's own documentation uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::U16 => "uint16",
            Self::I16 => "int16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::F32 => "float32",
            Self::Bool => "bool",
            Self::Text => "string",
            Self::Array => "array",
            Self::U64 => "uint64",
            Self::I64 => "int64",
            Self::F64 => "float64",
        }
    }
}

/// A metadata value.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each is what it is called")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// Its type.
    pub fn kind(&self) -> ValueKind {
        match self {
            Self::U8(_) => ValueKind::U8,
            Self::I8(_) => ValueKind::I8,
            Self::U16(_) => ValueKind::U16,
            Self::I16(_) => ValueKind::I16,
            Self::U32(_) => ValueKind::U32,
            Self::I32(_) => ValueKind::I32,
            Self::F32(_) => ValueKind::F32,
            Self::Bool(_) => ValueKind::Bool,
            Self::Text(_) => ValueKind::Text,
            Self::Array(_) => ValueKind::Array,
            Self::U64(_) => ValueKind::U64,
            Self::I64(_) => ValueKind::I64,
            Self::F64(_) => ValueKind::F64,
        }
    }

    /// A whole number of any type that fits; converters differ in the type they choose.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => i64::try_from(v).ok(),
            Self::I64(v) => Some(v),
            _ => None,
        }
    }

    /// A number of any type. An F32 becomes the number that was written to be stored as it: 0.1, not 0.100000001.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => v.to_string().parse().ok(),
            Self::F64(v) => Some(v),
            _ => self.as_i64().map(|v| v as f64),
        }
    }

    /// Text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// The value as a file has it, without its type.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.push(*v),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push((*v).into()),
            Self::Text(text) => put_text(text, out),
            Self::Array(array) => {
                out.extend(array.kind.code().to_le_bytes());
                out.extend((array.len as u64).to_le_bytes());
                out.extend_from_slice(array.bytes.bytes());
            }
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }

    /// For messages: the value itself, cut short.
    pub(super) fn brief(&self) -> String {
        match self {
            Self::Text(text) => match text.char_indices().nth(60) {
                Some((at, _)) => format!("{:?}...", &text[..at]),
                None => format!("{text:?}"),
            },
            Self::Array(array) => format!("an array of {} {}", array.len, array.kind.name()),
            Self::Bool(v) => v.to_string(),
            Self::F32(v) => v.to_string(),
            Self::F64(v) => v.to_string(),
            Self::U64(v) => v.to_string(),
            other => other.as_i64().map(|v| v.to_string()).unwrap_or_default(),
        }
    }
}

macro_rules! from {
    ($($type:ty => $variant:ident),+ $(,)?) => {
        $(impl From<$type> for Value {
            fn from(v: $type) -> Self {
                Self::$variant(v)
            }
        })+
    };
}
from!(u32 => U32, i32 => I32, u64 => U64, f32 => F32, bool => Bool, u16 => U16, String => Text, Array => Array);

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::Text(v.into())
    }
}

/// A list of values of one type. It keeps the bytes of the file, so a vocabulary takes no memory of its own.
#[derive(Debug, Clone)]
pub struct Array {
    pub(super) kind: ValueKind,
    pub(super) len: usize,
    /// The elements as a file has them, proven to be `len` of `kind`.
    pub(super) bytes: ByteRegion,
}

impl Array {
    /// A list of texts.
    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut bytes, mut len) = (Vec::new(), 0);
        for text in texts {
            put_text(text, &mut bytes);
            len += 1;
        }
        Self { kind: ValueKind::Text, len, bytes: ByteRegion::from_vec(bytes) }
    }

    /// A list of whole numbers.
    pub fn i32s(values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { kind: ValueKind::I32, len: values.len(), bytes: ByteRegion::from_vec(bytes) }
    }

    /// A list of numbers.
    pub fn f32s(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { kind: ValueKind::F32, len: values.len(), bytes: ByteRegion::from_vec(bytes) }
    }

    /// Type of the elements.
    pub fn kind(&self) -> ValueKind {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of a list of texts; `None` for a list of anything else.
    pub fn as_texts(&self) -> Option<impl Iterator<Item = &str>> {
        let mut rest = self.bytes.bytes();
        (self.kind == ValueKind::Text).then_some(std::iter::from_fn(move || {
            let (len, after) = rest.split_first_chunk::<8>()?;
            let (text, after) = after.split_at_checked(u64::from_le_bytes(*len) as usize)?;
            rest = after;
            std::str::from_utf8(text).ok()
        }))
    }

    /// The elements of a list of whole numbers of at most 32 bits; `None` for a list of anything else.
    pub fn as_i64s(&self) -> Option<impl Iterator<Item = i64>> {
        let decode: fn(&[u8]) -> i64 = match self.kind {
            ValueKind::U8 => |b| b[0].into(),
            ValueKind::I8 => |b| b[0].cast_signed().into(),
            ValueKind::U16 => |b| u16::from_le_bytes([b[0], b[1]]).into(),
            ValueKind::I16 => |b| i16::from_le_bytes([b[0], b[1]]).into(),
            ValueKind::U32 => |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
            ValueKind::I32 => |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
            _ => return None,
        };
        Some(self.bytes.bytes().chunks_exact(self.kind.bytes()?).map(decode))
    }
}

pub(super) fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_was_meant() {
        assert_eq!(Value::F32(0.1).as_f64(), Some(0.1));
        assert_eq!(Value::F32(2.827).as_f64(), Some(2.827));
        assert_eq!(Value::F32(1e-6).as_f64(), Some(1e-6));
        assert_eq!(Value::U32(7).as_f64(), Some(7.0));
        assert_eq!(Value::U64(u64::MAX).as_i64(), None);
        assert_eq!(Value::I16(-3).as_i64(), Some(-3));
        assert_eq!(Value::Text("7".into()).as_f64(), None);
    }

    #[test]
    fn lists_give_back_what_they_were_made_of() {
        let texts = Array::texts(["", "Ġa", "b c"]);
        assert_eq!(texts.as_texts().unwrap().collect::<Vec<_>>(), ["", "Ġa", "b c"]);
        assert!(texts.as_i64s().is_none());
        let numbers = Array::i32s(&[-1, 5]);
        assert_eq!(numbers.as_i64s().unwrap().collect::<Vec<_>>(), [-1, 5]);
        assert!(numbers.as_texts().is_none());
    }
}

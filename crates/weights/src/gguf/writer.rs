//! Writes GGUF files: first all that will be in the file is declared, then the bytes of the tensors stream through.

use std::io::{self, Write};

use super::{
    kinds::GgmlType,
    reader::{ALIGNMENT_DEFAULT, ALIGNMENT_KEY, ALIGNMENT_MAX, DIMENSIONS_MAX, MAGIC},
    value::{Value, put_text},
};

/// What we write; it has the layout of version 2.
const VERSION: u32 = 3;

/// The head of a GGUF file to be.
#[derive(Debug)]
pub struct GgufWriter {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Declared>,
    alignment: usize,
    /// Where the next tensor goes, from where the data begins.
    end: u64,
}

#[derive(Debug)]
struct Declared {
    name: String,
    kind: GgmlType,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self { metadata: Vec::new(), tensors: Vec::new(), alignment: ALIGNMENT_DEFAULT, end: 0 }
    }
}

impl GgufWriter {
    /// A file with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry. One of `general.alignment` also aligns the tensors that are declared after it.
    ///
    /// # Errors
    /// When the key is there already or the alignment is none.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> io::Result<()> {
        let value = value.into();
        if self.metadata.iter().any(|(k, _)| k == key) {
            return Err(invalid(format!("key {key} is set twice")));
        }
        if key == ALIGNMENT_KEY {
            let n = value.as_i64().and_then(|n| usize::try_from(n).ok());
            let n = n.filter(|n| n.is_power_of_two() && *n <= ALIGNMENT_MAX && self.tensors.is_empty());
            self.alignment = n.ok_or_else(|| invalid(format!("{key}: {} cannot be used", value.brief())))?;
        }
        self.metadata.push((key.into(), value));
        Ok(())
    }

    /// Declares a tensor. `shape` is outermost first; rows are a whole number of the type's blocks.
    ///
    /// # Errors
    /// When the name is there already, or the shape does not fit the format.
    pub fn tensor(&mut self, name: &str, kind: GgmlType, shape: &[usize]) -> io::Result<()> {
        let bad = |why: &str| Err(invalid(format!("tensor {name}: shape {shape:?}: {why}")));
        if self.tensors.iter().any(|t| t.name == name) {
            return bad("is declared twice");
        }
        if !(1..=DIMENSIONS_MAX).contains(&shape.len()) || shape.contains(&0) {
            return bad("expected 1 to 4 sizes, none of them 0");
        }
        if !shape[shape.len() - 1].is_multiple_of(kind.block_len()) {
            return bad("its rows are no whole number of blocks");
        }
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let bytes =
            elements.and_then(|n| (n / kind.block_len() as u64).checked_mul(kind.block_bytes() as u64));
        let next =
            bytes.and_then(|b| self.end.checked_add(b)?.checked_next_multiple_of(self.alignment as u64));
        let (Some(bytes), Some(next)) = (bytes, next) else { return bad("overflows") };
        self.tensors.push(Declared { name: name.into(), kind, shape: shape.into(), offset: self.end, bytes });
        self.end = next;
        Ok(())
    }

    /// Writes the head and gives what takes the bytes of the tensors, in the order in which they were declared.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn begin<W: Write>(self, mut out: W) -> io::Result<GgufBody<W>> {
        let mut head = Vec::new();
        head.extend_from_slice(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(key, &mut head);
            head.extend(value.kind().code().to_le_bytes());
            value.put(&mut head);
        }
        for t in &self.tensors {
            put_text(&t.name, &mut head);
            head.extend((t.shape.len() as u32).to_le_bytes());
            for &size in t.shape.iter().rev() {
                head.extend((size as u64).to_le_bytes());
            }
            head.extend(t.kind.code().to_le_bytes());
            head.extend(t.offset.to_le_bytes());
        }
        head.resize(head.len().next_multiple_of(self.alignment), 0);
        out.write_all(&head)?;
        Ok(GgufBody {
            out,
            tensors: self.tensors.into_iter(),
            left: 0,
            alignment: self.alignment,
            padding: 0,
        })
    }
}

/// A GGUF file whose head is written.
#[derive(Debug)]
pub struct GgufBody<W> {
    out: W,
    tensors: std::vec::IntoIter<Declared>,
    /// Bytes of the tensor at hand that are still to come.
    left: u64,
    alignment: usize,
    /// Bytes between it and the next.
    padding: usize,
}

impl<W: Write> GgufBody<W> {
    /// The next bytes of the tensors, in any pieces.
    ///
    /// # Errors
    /// What the file answers, or when there are more bytes than tensors for them.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.left == 0 {
                let next =
                    self.tensors.next().ok_or_else(|| invalid("bytes after the last tensor".into()))?;
                self.left = next.bytes;
                self.padding = (next.bytes.next_multiple_of(self.alignment as u64) - next.bytes) as usize;
            }
            let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
            self.out.write_all(&bytes[..n])?;
            self.left -= n as u64;
            bytes = &bytes[n..];
            if self.left == 0 {
                // The last one is padded too: llama.cpp asks for it.
                io::copy(&mut io::Read::take(io::repeat(0), self.padding as u64), &mut self.out)?;
            }
        }
        Ok(())
    }

    /// Ends the file and gives back what it was written to.
    ///
    /// # Errors
    /// What the file answers, or when bytes of tensors are missing.
    pub fn finish(mut self) -> io::Result<W> {
        if self.left > 0 {
            return Err(invalid(format!("{} bytes of a tensor are missing", self.left)));
        }
        if let Some(t) = self.tensors.next() {
            return Err(invalid(format!("tensor {}: its bytes are missing", t.name)));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

pub(super) fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

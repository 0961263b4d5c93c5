//! Golden files: safetensors with answers, and checkpoints that are stored compressed.

use std::{fs, io::Read, path::Path};

use flate2::read::GzDecoder;
use oxseek_tensor::ByteRegion;
use oxseek_weights::{Checkpoint, SafeTensors};

use crate::{Error, rescaled};

/// How a gzip file begins (RFC 1952, 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The answers of one golden file.
pub struct Golden(SafeTensors);

impl Golden {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Checkpoint`]
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::from_bytes(&path.display().to_string(), ByteRegion::from_vec(read(path)?))
    }

    /// Takes the bytes of a golden file called `name`, compressed or not.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Checkpoint`]
    pub fn from_bytes(name: &str, bytes: ByteRegion) -> Result<Self, Error> {
        let is_packed = bytes.bytes().starts_with(&GZIP_MAGIC);
        let bytes =
            if is_packed { ByteRegion::from_vec(unpack(Path::new(name), bytes.bytes())?) } else { bytes };
        Ok(Self(SafeTensors::read(name, bytes)?))
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// An F32 tensor's values.
    ///
    /// # Errors
    /// [`Error::Golden`]
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, Error> {
        let bytes = self.typed(name, &["F32"])?.1;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// An I32 or I64 tensor's values as token or expert ids.
    ///
    /// # Errors
    /// [`Error::Golden`]
    pub fn ids(&self, name: &str) -> Result<Vec<u32>, Error> {
        let (dtype, bytes) = self.typed(name, &["I32", "I64"])?;
        // Ids are small and not negative: the low four bytes hold them.
        let width = if dtype == "I32" { 4 } else { 8 };
        Ok(bytes.chunks_exact(width).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn typed(&self, name: &str, allowed: &[&str]) -> Result<(&str, &[u8]), Error> {
        let golden = |why: String| Error::Golden { name: name.into(), why };
        let t = self.0.get(name).ok_or_else(|| golden("missing".into()))?;
        if !allowed.contains(&t.dtype) {
            return Err(golden(format!("{}, expected {}", t.dtype, allowed.join(" or "))));
        }
        Ok((t.dtype, t.bytes))
    }
}

/// Opens a checkpoint folder whose weights are stored as `model.safetensors.gz`, as `model.safetensors.planes.gz`
/// (which is smaller where values have two or four bytes), as `model.safetensors.from-X.gz` (what the folder `X` beside
/// it does not tell, see [`rescaled`]), or an ordinary one.
///
/// # Errors
/// [`Error::Io`] or [`Error::Checkpoint`]
pub fn open_checkpoint(folder: &Path) -> Result<Checkpoint, Error> {
    let Some(weights) = packed_weights(folder)? else {
        return Ok(Checkpoint::open(folder)?);
    };
    let mut files = vec![("model.safetensors".to_string(), ByteRegion::from_vec(weights))];
    for name in ["config.json", "generation_config.json"] {
        let path = folder.join(name);
        if path.exists() {
            files.push((name.to_string(), ByteRegion::from_vec(read(&path)?)));
        }
    }
    Ok(Checkpoint::from_files(files)?)
}

fn packed_weights(folder: &Path) -> Result<Option<Vec<u8>>, Error> {
    let (whole, planes) = (folder.join("model.safetensors.gz"), folder.join("model.safetensors.planes.gz"));
    if whole.exists() {
        return Ok(Some(unpack(&whole, &read(&whole)?)?));
    }
    if planes.exists() {
        return Ok(Some(from_planes(&unpack(&planes, &read(&planes)?)?)));
    }
    let prefix = "model.safetensors.from-";
    for entry in fs::read_dir(folder).map_err(|source| Error::Io { path: folder.into(), source })?.flatten() {
        let name = entry.file_name();
        let base = name.to_str().and_then(|name| name.strip_prefix(prefix)?.strip_suffix(".gz"));
        if let Some(base) = base {
            return from_other(&entry.path(), &folder.with_file_name(base)).map(Some);
        }
    }
    Ok(None)
}

fn from_other(difference: &Path, base: &Path) -> Result<Vec<u8>, Error> {
    let golden = |why: String| Error::Golden { name: difference.display().to_string(), why };
    let weights = packed_weights(base)?.ok_or_else(|| golden("nothing to add it to".into()))?;
    rescaled::apply(&weights, &unpack(difference, &read(difference)?)?).map_err(golden)
}

/// Undoes the order in which all bytes at places `4 i` come first, then those at `4 i + 1`, and so on.
fn from_planes(planes: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; planes.len()];
    let mut rest = planes.iter();
    for plane in 0..4 {
        let places = bytes.iter_mut().skip(plane).step_by(4);
        places.zip(&mut rest).for_each(|(byte, from)| *byte = *from);
    }
    bytes
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Io { path: path.into(), source })
}

fn unpack(path: &Path, packed: &[u8]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    GzDecoder::new(packed)
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Io { path: path.into(), source })?;
    Ok(bytes)
}

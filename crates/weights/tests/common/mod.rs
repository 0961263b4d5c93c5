//! Files made in memory.
#![allow(dead_code, reason = "each test takes what it needs")]

pub mod gguf;

use oxseek_tensor::ByteRegion;

/// Files of a checkpoint: name and bytes.
pub type Files = Vec<(String, Vec<u8>)>;

/// Name, type, sizes and bytes of a tensor.
pub type Tensor<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

/// A safetensors file of a header and its data, whatever they say.
pub fn container(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A valid safetensors file.
pub fn safetensors(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert((*name).to_string(), entry);
    }
    container(serde_json::Value::from(header).to_string().as_bytes(), &data)
}

/// F32 values as a file has them.
pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Files as a checkpoint takes them.
pub fn regions(files: Files) -> Vec<(String, ByteRegion)> {
    files.into_iter().map(|(name, bytes)| (name, ByteRegion::from_vec(bytes))).collect()
}

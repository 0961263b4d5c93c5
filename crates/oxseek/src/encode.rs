//! Rows of numbers into a storage format.

use oxseek_tensor::{
    DType, blocks,
    dtype::{f32_to_bf16, f32_to_e4m3, f32_to_f16},
};

/// `values`, a whole number of blocks, as `dtype`; FP8 as codes alone.
pub fn row(dtype: DType, values: &[f32], out: &mut [u8]) {
    match dtype {
        DType::F32 => each(values, out, f32::to_le_bytes),
        DType::F16 => each(values, out, |v| f32_to_f16(v).to_le_bytes()),
        DType::BF16 => each(values, out, |v| f32_to_bf16(v).to_le_bytes()),
        DType::F8E4M3 => each(values, out, |v| [f32_to_e4m3(v)]),
        DType::Q8_0 => each_block(values, out, blocks::encode_q8_0),
        DType::Q4_0 => each_block(values, out, blocks::encode_q4_0),
        DType::Q4K => each_block(values, out, blocks::encode_q4_k),
    }
}

fn each<const B: usize>(values: &[f32], out: &mut [u8], encode: fn(f32) -> [u8; B]) {
    for (v, out) in values.iter().zip(out.as_chunks_mut::<B>().0) {
        *out = encode(*v);
    }
}

fn each_block<const N: usize, const B: usize>(
    values: &[f32],
    out: &mut [u8],
    encode: fn(&[f32; N], &mut [u8; B]),
) {
    for (values, out) in values.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<B>().0) {
        encode(values, out);
    }
}

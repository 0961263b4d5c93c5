//! FP8 checkpoints that are stored as their difference from one with the same values and other block scales.
//!
//! A value's code under one scale nearly tells its code under another, so the difference packs into a fifth.

use std::ops::Range;

use oxseek_tensor::dtype::{e4m3_to_f32, f32_to_e4m3};
use serde::Deserialize;

/// Rows and columns that share a scale (deepseek.md, 5).
const BLOCK: usize = 128;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// Makes a safetensors file of the file `base`, which has the same header, and of `difference`: what is to be added
/// to each byte of `base`, and in FP8 tensors to the code nearest to the value under the new scale.
///
/// # Errors
/// What does not fit, in words
pub fn apply(base: &[u8], difference: &[u8]) -> Result<Vec<u8>, String> {
    if base.len() != difference.len() {
        return Err(format!("{} bytes differ from a file of {}", difference.len(), base.len()));
    }
    let mut bytes: Vec<u8> = base.iter().zip(difference).map(|(b, d)| b.wrapping_add(*d)).collect();
    for fp8 in Rescaled::all(base)? {
        let ratios = fp8.ratios(base, &bytes);
        let nearest = |ratio: &f32| -> [u8; 256] {
            std::array::from_fn(|code| f32_to_e4m3(e4m3_to_f32(code as u8) * ratio))
        };
        let nearest: Vec<_> = ratios.iter().map(nearest).collect();
        for i in 0..fp8.codes.len() {
            let (row, col, place) = (i / fp8.cols, i % fp8.cols, fp8.codes.start + i);
            let block = row / BLOCK * fp8.cols.div_ceil(BLOCK) + col / BLOCK;
            bytes[place] = nearest[block][base[place] as usize].wrapping_add(difference[place]);
        }
    }
    Ok(bytes)
}

/// An FP8 matrix: where a file has its codes and its scales.
struct Rescaled {
    codes: Range<usize>,
    cols: usize,
    scales: Range<usize>,
}

impl Rescaled {
    fn all(file: &[u8]) -> Result<Vec<Self>, String> {
        let length = file.first_chunk::<8>().map_or(0, |n| u64::from_le_bytes(*n) as usize);
        let data = length.saturating_add(8);
        let header = file.get(8..data).ok_or("the header is cut off")?;
        let mut header: serde_json::Map<_, _> = serde_json::from_slice(header).map_err(|e| e.to_string())?;
        header.remove("__metadata__");
        let entry = |name: &str| -> Result<(Entry, Range<usize>), String> {
            let entry = header.get(name).ok_or(format!("{name} is missing"))?;
            let entry = Entry::deserialize(entry).map_err(|e| e.to_string())?;
            let [from, to] = entry.data_offsets.map(|offset| data.saturating_add(offset));
            if from > to || to > file.len() {
                return Err(format!("{name} is cut off"));
            }
            Ok((entry, from..to))
        };
        let mut all = Vec::new();
        for name in header.keys() {
            let (matrix, codes) = entry(name)?;
            let ("F8_E4M3", &[rows, cols]) = (&*matrix.dtype, &*matrix.shape) else { continue };
            let (_, scales) = entry(&format!("{name}_scale_inv"))?;
            let blocks = rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK);
            if codes.len() != rows * cols || scales.len() != blocks * size_of::<f32>() {
                return Err(format!("{name} has no scale for each block"));
            }
            all.push(Self { codes, cols, scales });
        }
        Ok(all)
    }

    /// Old scale by new scale of each block
    fn ratios(&self, old: &[u8], new: &[u8]) -> Vec<f32> {
        let read = |file: &[u8]| -> Vec<f32> {
            let (scales, _) = file[self.scales.clone()].as_chunks::<4>();
            scales.iter().map(|scale| f32::from_le_bytes(*scale)).collect()
        };
        read(old).iter().zip(read(new)).map(|(old, new)| old / new).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`apply`] needs to make `file` of `base`
    fn difference(base: &[u8], file: &[u8]) -> Vec<u8> {
        let direct: Vec<u8> = file.iter().zip(base).map(|(f, b)| f.wrapping_sub(*b)).collect();
        let applied = apply(base, &direct).unwrap();
        let off = |((f, a), d): ((&u8, &u8), &u8)| f.wrapping_sub(a.wrapping_sub(*d));
        file.iter().zip(&applied).zip(&direct).map(off).collect()
    }

    fn file(scales: [f32; 2], codes: impl Iterator<Item = u8>) -> Vec<u8> {
        let header = r#"{"w":{"dtype":"F8_E4M3","shape":[2,130],"data_offsets":[8,268]},
            "w_scale_inv":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        scales.iter().for_each(|scale| file.extend(scale.to_le_bytes()));
        file.extend(codes);
        file
    }

    #[test]
    fn another_scale_is_a_difference_of_few_values() {
        let values = || (0..260).map(|i| (i * i % 997) as f32 - 400.0);
        let scaled = |s: f32| values().map(move |v| f32_to_e4m3(v / s));
        let (base, new) = (file([1.5; 2], scaled(1.5)), file([2.0; 2], scaled(2.0)));
        let difference = difference(&base, &new);
        assert_eq!(apply(&base, &difference).unwrap(), new);
        let codes = &difference[base.len() - 260..];
        let missed: Vec<&u8> = codes.iter().filter(|d| **d != 0).collect();
        assert!(missed.len() < 80 && missed.iter().all(|d| [1, 255].contains(*d)), "{codes:?}");
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        let good = file([1.0; 2], (0..=255).chain(0..4));
        assert!(apply(&good, &good[1..]).unwrap_err().contains("bytes differ from a file of"));
        let cut = |n: usize| apply(&good[..n], &good[..n]).unwrap_err();
        assert_eq!(cut(4), "the header is cut off");
        assert_eq!(cut(100), "the header is cut off");
        assert_eq!(cut(good.len() - 1), "w is cut off");
    }
}

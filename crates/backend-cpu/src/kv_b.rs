//! What makes keys and values from latent rows, laid out for the kernels of `simd/attention.rs`.
#![allow(unsafe_code, reason = "threads fill disjoint parts of one buffer; kernels read pointers")]

use oxseek_tensor::{
    Error, HostMatrix,
    backend::{KvBParts, MlaShape},
    dtype::f32_to_bf16,
};

use crate::{
    huge::{Arena, HugeBytes},
    memory::Bytes,
    packed::GROUP_ROWS,
    threads::Pool,
};

mod part;

pub(crate) use part::{Part, ROWS, RoundedInputs};

/// Latent values of a query that one task makes, for all heads: whole groups.
pub(crate) const SLICE: usize = 64;

/// The weights of one layer in BF16, three times: sixteen outputs side by side, pairs of inputs in each of them. Where
/// the file has blocks that absorbed attention can multiply with, it does so, and reads a quarter to a half as much.
///
/// It is packed while the model loads: it is small, and what is in its place until then would need code of its own.
pub(crate) struct PackedKvB {
    #[allow(dead_code, reason = "keeps what the panels point to; tests look at it")]
    bytes: Vec<HugeBytes>,
    panels: KvBPanels,
}

/// [`PackedKvB`] while an op reads it.
#[derive(Clone, Copy)]
pub(crate) struct KvBPanels {
    /// Per head, latent values from the nope part of a query: `W_UK^T`.
    pub(crate) absorb: Part,
    /// Per head, a value from the weighted sum of latent rows: `W_UV`.
    pub(crate) means: Part,
    /// Per head, the nope part of a key from a latent row: `W_UK`.
    pub(crate) keys: Panels,
    /// Per head, a value from a latent row: `W_UV`.
    pub(crate) values: Panels,
}

/// `kv_b` of one layer as products use it.
pub(crate) struct KvBFactor {
    pub(crate) shape: MlaShape,
    pub(crate) factor: Factor,
}

/// By precision.
pub(crate) enum Factor {
    /// Exact: as stored.
    Stored(HostMatrix),
    /// Native.
    Packed(PackedKvB),
}

/// One panel per head. Its groups of sixteen outputs come in slices: the first of all heads, then the second, so that
/// a task that makes a slice for all heads reads one stream.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    first: *const u8,
    heads: usize,
    /// Outputs of each head.
    pub(crate) rows: usize,
    /// Pairs of inputs.
    pub(crate) units: usize,
    /// Groups of a slice.
    slice: usize,
}

// SAFETY: it only points to weights, which nobody writes.
unsafe impl Send for Panels {}
// SAFETY: as above.
unsafe impl Sync for Panels {}

impl Panels {
    fn new(heads: usize, rows: usize, cols: usize, slice: usize) -> Self {
        Self { first: std::ptr::null(), heads, rows, units: cols.div_ceil(2), slice }
    }

    /// Bytes of a group of sixteen outputs.
    pub(crate) fn group_bytes(&self) -> usize {
        self.units * 64
    }

    fn slices(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS).div_ceil(self.slice)
    }

    fn slice_bytes(&self) -> usize {
        self.slice * self.group_bytes()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.heads * self.slices() * self.slice_bytes()
    }

    /// A head's panel from group `group` to the end of its slice.
    pub(crate) fn at(&self, head: usize, group: usize) -> *const u8 {
        let slice = (group / self.slice * self.heads + head) * self.slice_bytes();
        self.first.wrapping_add(slice + group % self.slice * self.group_bytes())
    }
}

impl PackedKvB {
    /// Packs `[H*(dn+dv), kl]` and the parts that it is made of, if the file has them; their shapes were checked.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or what the pool answers.
    pub(crate) fn new(
        m: &HostMatrix,
        of_file: Option<&KvBParts>,
        shape: &MlaShape,
        arena: &mut Arena,
        pool: &mut Pool,
    ) -> Result<Self, Error> {
        let MlaShape { heads, nope, value, latent, .. } = *shape;
        let mut all = Vec::new();
        let (mut of_keys, mut of_values) = (None, None);
        if let Some(KvBParts { keys, values }) = of_file {
            of_keys = Part::in_blocks(keys, latent, &mut all, arena, pool)?;
            of_values = Part::in_blocks(values, value, &mut all, arena, pool)?;
        }
        let whole = |rows, cols| Panels::new(heads, rows, cols, rows.div_ceil(GROUP_ROWS).max(1));
        let absorbed_rows = if of_keys.is_some() { 0 } else { latent };
        let absorb = Panels::new(heads, absorbed_rows, nope, SLICE / GROUP_ROWS);
        let mut parts = [absorb, whole(nope, latent), whole(value, latent)];
        let mut bytes = arena.alloc(parts.iter().map(Panels::bytes).sum::<usize>())?;
        let mut first = bytes.as_ptr();
        for part in &mut parts {
            part.first = first;
            first = first.wrapping_add(part.bytes());
        }
        let out = Bytes::new(bytes.as_mut());
        pool.run(heads, &|head, _| {
            let rows = decode_head(m, head * (nope + value), nope + value);
            let (keys, values) = rows.split_at(nope * latent);
            for (i, p) in parts.iter().enumerate() {
                for slice in 0..p.slices() {
                    let start = p.at(head, slice * p.slice).addr() - parts[0].first.addr();
                    // SAFETY: this head's part of the buffer, which no other task touches.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.at(start), p.slice_bytes()) };
                    match i {
                        0 => pack_columns(keys, latent, slice * SLICE, out),
                        1 => pack_rows(keys, latent, out),
                        _ => pack_rows(values, latent, out),
                    }
                }
            }
        })?;
        all.push(bytes);
        let [absorb, keys, values] = parts;
        let absorb = of_keys.unwrap_or(Part::Panels(absorb));
        let means = of_values.unwrap_or(Part::Panels(values));
        Ok(Self { bytes: all, panels: KvBPanels { absorb, means, keys, values } })
    }

    pub(crate) fn panels(&self) -> KvBPanels {
        self.panels
    }

    /// Bytes that making queries and outputs of a token reads.
    pub(crate) fn absorbed_bytes(&self) -> usize {
        self.panels.absorb.bytes() + self.panels.means.bytes()
    }
}

/// Rows of `m` in BF16.
fn decode_head(m: &HostMatrix, first: usize, n: usize) -> Vec<u16> {
    let mut row = vec![0.0; m.cols()];
    let mut all = Vec::with_capacity(n * m.cols());
    for r in first..first + n {
        m.decode_row(r, &mut row);
        all.extend(row.iter().map(|v| f32_to_bf16(*v)));
    }
    all
}

/// Each row is an output: pairs of its columns.
fn pack_rows(rows: &[u16], cols: usize, out: &mut [u8]) {
    let (words, _) = out.as_chunks_mut::<4>();
    let group = cols.div_ceil(2) * GROUP_ROWS;
    for (r, row) in rows.chunks_exact(cols).enumerate() {
        let words = &mut words[r / GROUP_ROWS * group + r % GROUP_ROWS..];
        for (pair, word) in row.chunks(2).zip(words.iter_mut().step_by(GROUP_ROWS)) {
            *word = word_of(pair[0], pair.get(1).copied().unwrap_or(0));
        }
    }
}

/// Each column from `first` on, as many as a slice has, is an output: pairs of rows.
fn pack_columns(rows: &[u16], cols: usize, first: usize, out: &mut [u8]) {
    let (words, _) = out.as_chunks_mut::<4>();
    let units = rows.len() / cols.max(1);
    let group = units.div_ceil(2) * GROUP_ROWS;
    let none = vec![0; cols];
    for (u, pair) in rows.chunks(2 * cols).enumerate() {
        let (even, odd) = pair.split_at(cols);
        let odd = if odd.is_empty() { &none } else { odd };
        let (even, odd) = (&even[first..cols.min(first + SLICE)], &odd[first..cols.min(first + SLICE)]);
        for (g, (even, odd)) in even.chunks(GROUP_ROWS).zip(odd.chunks(GROUP_ROWS)).enumerate() {
            let words = &mut words[g * group + u * GROUP_ROWS..];
            for (word, (e, o)) in words.iter_mut().zip(even.iter().zip(odd)) {
                *word = word_of(*e, *o);
            }
        }
    }
}

fn word_of(even: u16, odd: u16) -> [u8; 4] {
    (u32::from(even) | u32::from(odd) << 16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use oxseek_tensor::{DType, conformance::Random, dtype::bf16_to_f32};

    use super::*;

    /// Input `i` of output `r`.
    fn weight(p: &Panels, bytes: &[u8], head: usize, r: usize, i: usize) -> f32 {
        let at = p.at(head, r / 16).addr() - bytes.as_ptr().addr() + i / 2 * 64 + r % 16 * 4 + i % 2 * 2;
        bf16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
    }

    #[test]
    fn every_weight_has_its_place() {
        let shape = MlaShape { heads: 3, nope: 5, rope: 2, value: 18, latent: 33, softmax_scale: 1.0 };
        let m = Random::new(3).matrix(DType::BF16, 3 * 23, 33).unwrap();
        let mut pool = Pool::new(2, crate::numa::Topology::default()).unwrap();
        let packed = PackedKvB::new(&m, None, &shape, &mut Arena::default(), &mut pool).unwrap();
        let Part::Panels(absorb) = packed.panels.absorb else { panic!("blocks of BF16") };
        let (bytes, mut row) = (packed.bytes[0].as_ref(), vec![0.0; 33]);
        for head in 0..3 {
            for r in 0..23 {
                m.decode_row(head * 23 + r, &mut row);
                for (c, w) in row.iter().enumerate() {
                    let found = if r < 5 {
                        let keys = weight(&packed.panels.keys, bytes, head, r, c);
                        assert_eq!(keys.to_bits(), w.to_bits());
                        weight(&absorb, bytes, head, c, r)
                    } else {
                        weight(&packed.panels.values, bytes, head, r - 5, c)
                    };
                    assert_eq!(found.to_bits(), w.to_bits(), "head {head} row {r} column {c}");
                }
            }
            // What pads a pair counts as zero.
            assert!(weight(&absorb, bytes, head, 0, 5).abs() < 1e-30);
            assert!(weight(&packed.panels.values, bytes, head, 17, 33).abs() < 1e-30);
        }
    }
}

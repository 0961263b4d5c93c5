//! How fast a level multiplies at best: tiles as the product kernels have them, over data that stays in the L1 cache.

use super::{Panel, Simd};

/// Bytes that the loops read: weights first, then a ring of activations.
pub(crate) const PEAK_BYTES: usize = WEIGHT_BYTES + RING * TOKENS_MAX * 4;
pub(crate) const WEIGHT_BYTES: usize = 128;
/// Steps after which the activations repeat: a sum over the same product could be taken out of the loop.
const RING: usize = 16;
/// Activations of a round: as many words of four bytes, of which a tile takes what it needs.
pub(crate) const TOKENS_MAX: usize = 12;

/// A loop of multiply-adds: `rounds` rounds over [`PEAK_BYTES`] bytes at `data`; gives how many there were, and a sum
/// of the results, so that nothing can be left out.
pub(crate) type Peak = unsafe fn(data: *const u8, rounds: usize) -> (u64, f32);

/// F32 times F32.
///
/// # Safety
/// [`PEAK_BYTES`] bytes at `data`; the CPU features of `V`.
#[inline(always)]
pub(super) unsafe fn f32_products<V: Simd>(data: *const u8, rounds: usize) -> (u64, f32) {
    // SAFETY: two vectors of at most 64 bytes, then the ring.
    unsafe {
        let w = [V::load(data.cast()), V::load(data.add(64).cast())];
        let mut acc = [[V::splat(0.0); 2]; 6];
        for r in 0..rounds {
            let x = data.add(WEIGHT_BYTES + r % RING * TOKENS_MAX * 4).cast::<f32>();
            for (j, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(x.add(j).read_unaligned());
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = w.fma(x, *acc);
                }
            }
        }
        let mut sum = V::splat(0.0);
        acc.as_flattened().iter().for_each(|a| sum = sum.add(*a));
        ((rounds * 12 * V::LANES) as u64, V::sum4([sum; 4])[0])
    }
}

/// BF16 times BF16.
///
/// # Safety
/// As [`f32_products`].
#[inline(always)]
pub(super) unsafe fn bf16_products<P: Panel>(data: *const u8, rounds: usize) -> (u64, f32) {
    // SAFETY: as the caller promises.
    unsafe { if P::PAIRS { bf16_tile::<P, 2, 8>(data, rounds) } else { bf16_tile::<P, 1, 4>(data, rounds) } }
}

#[inline(always)]
unsafe fn bf16_tile<P: Panel, const G: usize, const T: usize>(data: *const u8, rounds: usize) -> (u64, f32) {
    // SAFETY: G times 64 bytes, then the ring.
    unsafe {
        let w: [P::W; G] = std::array::from_fn(|i| P::load_bf16(data.add(i * 64)));
        let mut acc = [[P::splat(0.0); G]; T];
        for r in 0..rounds {
            let x = data.add(WEIGHT_BYTES + r % RING * TOKENS_MAX * 4);
            for (j, acc) in acc.iter_mut().enumerate() {
                let x = P::pair(x.add(j * 4));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = P::dot_bf16(*acc, w, x);
                }
            }
        }
        ((rounds * G * T * 32) as u64, acc.as_flattened().iter().map(|a| sum_of_lanes::<P>(*a)).sum())
    }
}

/// Unsigned bytes times signed bytes.
///
/// # Safety
/// As [`f32_products`].
#[inline(always)]
pub(super) unsafe fn byte_products<P: Panel>(data: *const u8, rounds: usize) -> (u64, f32) {
    // SAFETY: as the caller promises.
    unsafe { if P::PAIRS { byte_tile::<P, 2, 8>(data, rounds) } else { byte_tile::<P, 1, 4>(data, rounds) } }
}

#[inline(always)]
unsafe fn byte_tile<P: Panel, const G: usize, const T: usize>(data: *const u8, rounds: usize) -> (u64, f32) {
    // SAFETY: G times 64 bytes, then the ring.
    unsafe {
        let w: [P::U; G] = std::array::from_fn(|i| P::load_u8(data.add(i * 64)));
        let mut acc = [[P::zero_i(); G]; T];
        for r in 0..rounds {
            let x = data.add(WEIGHT_BYTES + r % RING * TOKENS_MAX * 4);
            for (j, acc) in acc.iter_mut().enumerate() {
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = P::dot_u7(*acc, w, x.add(j * 4));
                }
            }
        }
        (
            (rounds * G * T * 64) as u64,
            acc.as_flattened().iter().map(|a| sum_of_lanes::<P>(P::to_f32(*a))).sum(),
        )
    }
}

/// All lanes: those that nobody reads are not computed where a level has sixteen of them in two vectors.
#[inline(always)]
unsafe fn sum_of_lanes<P: Panel>(v: P::F) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: sixteen lanes.
    unsafe { P::store(v, lanes.as_mut_ptr()) };
    lanes.into_iter().sum()
}

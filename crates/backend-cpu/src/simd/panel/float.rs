//! BF16 and FP8 weights with BF16 activations, summed in F32.

use super::{Panel, PanelGemm, Tiled};
use crate::packed::E4M3_BLOCK_BYTES;

pub(super) struct Bf16;
pub(super) struct E4m3;

/// The weights of the next groups: while the tiles of many tokens use these groups, the next ones come from memory.
struct Ahead {
    next: *const u8,
    /// 256ths of a byte per unit.
    step: usize,
}

impl Ahead {
    /// Each tile of `T` tokens brings its share of what follows.
    fn new<const G: usize, const T: usize>(g: &PanelGemm<'_>, group: usize, t: usize) -> Self {
        let tiles = (g.tokens.len() / T).max(1);
        let share = G * g.w.group_bytes / tiles;
        Self { next: g.w.group(group + G).wrapping_add(t / T * share), step: G * 64 * 256 / tiles }
    }

    #[inline(always)]
    fn line(&self, unit: usize) -> *const u8 {
        self.next.wrapping_add((unit * self.step) >> 8)
    }
}

impl<P: Panel> Tiled<P> for Bf16 {
    const WIDE_PAIRS: bool = true;

    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize>(
        g: &PanelGemm<'_>,
        group: usize,
        t: usize,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds `units` times 64 bytes, and a row of x `units` pairs.
        unsafe {
            let w: [*const u8; G] = std::array::from_fn(|i| g.w.group(group + i));
            let x: [*const u8; T] =
                std::array::from_fn(|i| g.x.data.add(g.tokens[t + i] as usize * g.x.row_bytes));
            let mut acc = [[P::splat(0.0); T]; G];
            let ahead = Ahead::new::<G, T>(g, group, t);
            for u in 0..g.w.cols.div_ceil(2) {
                if T >= 8 {
                    P::prefetch(ahead.line(u));
                }
                let w: [P::W; G] = std::array::from_fn(|i| P::load_bf16(w[i].add(u * 64)));
                for j in 0..T {
                    let x = P::pair(x[j].add(u * 4));
                    for i in 0..G {
                        acc[i][j] = P::dot_bf16(acc[i][j], w[i], x);
                    }
                }
            }
            acc
        }
    }
}

impl<P: Panel> Tiled<P> for E4m3 {
    const WIDE_PAIRS: bool = false;

    /// Each block of 128 columns is summed on its own and then scaled.
    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize>(
        g: &PanelGemm<'_>,
        group: usize,
        t: usize,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds its scales and then whole blocks of codes; a row of x whole blocks of pairs.
        unsafe {
            let blocks = g.w.cols.div_ceil(128);
            let scales: [*const f32; G] = std::array::from_fn(|i| g.w.group(group + i).cast());
            let codes: [*const u8; G] = std::array::from_fn(|i| g.w.group(group + i).add(g.w.header_bytes));
            let x: [*const u8; T] =
                std::array::from_fn(|i| g.x.data.add(g.tokens[t + i] as usize * g.x.row_bytes));
            let mut total = [[P::splat(0.0); T]; G];
            for b in 0..blocks {
                let mut acc = [[P::splat(0.0); T]; G];
                for u in 0..32 {
                    let w: [[P::W; 2]; G] =
                        std::array::from_fn(|i| P::load_e4m3(codes[i].add(b * E4M3_BLOCK_BYTES + u * 64)));
                    for j in 0..T {
                        let x = x[j].add(b * 256 + u * 8);
                        let x = [P::pair(x), P::pair(x.add(4))];
                        for i in 0..G {
                            acc[i][j] = P::dot_bf16(acc[i][j], w[i][0], x[0]);
                            acc[i][j] = P::dot_bf16(acc[i][j], w[i][1], x[1]);
                        }
                    }
                }
                for i in 0..G {
                    let scale = P::splat(*scales[i].add(b));
                    for j in 0..T {
                        total[i][j] = P::fma(acc[i][j], scale, total[i][j]);
                    }
                }
            }
            total
        }
    }
}

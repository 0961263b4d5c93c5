//! BF16 and FP8 weights with BF16 activations, summed in F32.
#![allow(clippy::needless_range_loop, reason = "rows and groups of a tile index several arrays at once")]

use super::{Ahead, Panel, Tiled};
use crate::packed::{E4M3_BLOCK_BYTES, PanelRef};

pub(super) struct Bf16;
pub(super) struct E4m3;

impl<P: Panel> Tiled<P> for Bf16 {
    const TILE: usize = P::TILE_BF16;
    const STREAMS_BELOW: usize = usize::MAX;
    const STREAMS_WIDE: bool = false;

    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize, const S: bool>(
        w: &PanelRef,
        groups: [*const u8; G],
        x: *const f32,
        ahead: &Ahead,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds `units` times 64 bytes, and a row of x at least as many pairs.
        unsafe {
            let units = w.cols.div_ceil(2);
            let mut acc = [[P::splat(0.0); T]; G];
            for run in 0..units / 64 {
                ahead.step::<P>(run);
                let stream = ahead.stream::<G, S>(groups, run * 64 * 64);
                for u in run * 64..run * 64 + 64 {
                    stream.fetch::<P>(u % 64..u % 64 + 1);
                    add_pairs::<P, G, T>(&groups, x, u, &mut acc);
                }
            }
            for u in units / 64 * 64..units {
                add_pairs::<P, G, T>(&groups, x, u, &mut acc);
            }
            acc
        }
    }
}

/// Adds the products of unit `u`, two columns.
#[inline(always)]
unsafe fn add_pairs<P: Panel, const G: usize, const T: usize>(
    groups: &[*const u8; G],
    x: *const f32,
    u: usize,
    acc: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the unit inside of both.
    unsafe {
        // Loops, not closures: a closure that is not inlined is compiled without the level's features.
        let mut w = [P::load_bf16(groups[0].add(u * 64)); G];
        for i in 1..G {
            w[i] = P::load_bf16(groups[i].add(u * 64));
        }
        for j in 0..T {
            let x = P::pair(x.add(u * T + j).cast());
            for i in 0..G {
                acc[i][j] = P::dot_bf16(acc[i][j], w[i], x);
            }
        }
    }
}

impl<P: Panel> Tiled<P> for E4m3 {
    const TILE: usize = P::TILE_BF16;
    const STREAMS_BELOW: usize = usize::MAX;
    const STREAMS_WIDE: bool = false;

    /// Each block of 128 columns is summed on its own and then scaled.
    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize, const S: bool>(
        w: &PanelRef,
        groups: [*const u8; G],
        x: *const f32,
        ahead: &Ahead,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds its scales and then whole blocks of codes; a row of x whole blocks of pairs.
        unsafe {
            let mut total = [[P::splat(0.0); T]; G];
            for b in 0..w.cols.div_ceil(128) {
                let codes: [*const u8; G] =
                    std::array::from_fn(|i| groups[i].add(w.header_bytes + b * E4M3_BLOCK_BYTES));
                let x = x.add(b * 64 * T);
                let mut acc = [[P::splat(0.0); T]; G];
                ahead.step::<P>(b);
                let stream = ahead.stream::<G, S>(groups, w.header_bytes + b * E4M3_BLOCK_BYTES);
                for u in 0..32 {
                    stream.fetch::<P>(u..u + 1);
                    let mut w = [P::load_e4m3(codes[0].add(u * 64)); G];
                    for i in 1..G {
                        w[i] = P::load_e4m3(codes[i].add(u * 64));
                    }
                    for half in 0..2 {
                        for j in 0..T {
                            let x = P::pair(x.add((u * 2 + half) * T + j).cast());
                            for i in 0..G {
                                acc[i][j] = P::dot_bf16(acc[i][j], w[i][half], x);
                            }
                        }
                    }
                }
                for i in 0..G {
                    let scale = P::splat(*groups[i].cast::<f32>().add(b));
                    for j in 0..T {
                        total[i][j] = P::fma(acc[i][j], scale, total[i][j]);
                    }
                }
            }
            total
        }
    }
}

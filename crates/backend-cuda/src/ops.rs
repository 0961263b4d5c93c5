//! What each op checks and launches.

mod matmul;
mod mla;
mod moe;
mod norm;
mod rope;

pub(crate) use moe::TILE_BYTES;

//! `rope_queries`.

use super::{Case, Random, buffer_of, read_rows};
use crate::{
    Backend, Error,
    backend::{AttendMode, MlaShape, Segment, StepInput},
};

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for (heads, nope, rope) in [(1, 1, 2), (3, 5, 6), (4, 24, 64), (6, 64, 32)] {
        let name = format!("rope_queries {heads} heads of {nope}+{rope}");
        all.push(Case::new(name, 2e-6, move |b, r| rotate(b, r, heads, nope, rope)));
    }
}

/// Rotary frequencies of a small base, as the models have them.
pub(super) fn frequencies(rope: usize) -> Vec<f32> {
    (0..rope / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rope as f32)).collect()
}

fn rotate(
    b: &mut dyn Backend,
    random: &mut Random,
    heads: usize,
    nope: usize,
    rope: usize,
) -> Result<Vec<f32>, Error> {
    let shape = MlaShape { heads, nope, rope, value: 1, latent: 1, softmax_scale: 1.0 };
    let table = b.load_rope(&frequencies(rope), 1.1)?;
    let width = heads * (nope + rope);
    let q = buffer_of(b, &random.normals(7 * width), width)?;
    let mode = AttendMode::Absorbed;
    b.begin_step(&StepInput {
        tokens: vec![0; 7],
        segments: vec![
            Segment { row: 0, rows: 3, start: 0, first_block: 0, mode },
            Segment { row: 3, rows: 4, start: 1021, first_block: 0, mode },
        ],
        blocks: vec![0; 17],
    })?;
    b.rope_queries(&shape, table, q)?;
    read_rows(b, q, 7, width)
}

//! What a backend must refuse with an error: bad handles, bad shapes, bad ids.

use super::{buffer_of, plain_step};
use crate::{
    Backend, CacheFormat, Error, HostMatrix,
    backend::{
        AttendMode, Buffer, Cache, CacheShape, GroupScore, MlaShape, RouterShape, Scoring, Segment,
        StepInput, Weight,
    },
};

type Refusal = (&'static str, fn(&mut dyn Backend) -> Result<(), Error>);

pub(super) fn cases() -> Vec<Refusal> {
    vec![
        ("an unknown weight", |b| {
            let x = b.alloc(1, 1)?;
            b.matmul(x, Weight(99), x, 1)
        }),
        ("an unknown buffer", |b| {
            let w = b.load_matrix(HostMatrix::from_f32(1, 1, &[1.0])?)?;
            b.matmul(Buffer(99), w, Buffer(98), 1)
        }),
        ("an input of another width", |b| {
            let w = b.load_matrix(HostMatrix::from_f32(2, 3, &[1.0; 6])?)?;
            let (x, out) = (b.alloc(1, 4)?, b.alloc(1, 2)?);
            b.matmul(x, w, out, 1)
        }),
        ("more rows than the buffer has", |b| {
            let w = b.load_matrix(HostMatrix::from_f32(3, 3, &[1.0; 9])?)?;
            let (x, out) = (b.alloc(2, 3)?, b.alloc(3, 3)?);
            b.matmul(x, w, out, 3)
        }),
        ("a token past the vocabulary", |b| {
            let w = b.load_matrix(HostMatrix::from_f32(3, 2, &[1.0; 6])?)?;
            let out = b.alloc(1, 2)?;
            let mut step = plain_step(1);
            step.tokens[0] = 3;
            b.begin_step(&step)?;
            b.embed(w, out)
        }),
        ("a segment that skips a row", |b| {
            let mut step = plain_step(2);
            step.segments[0].row = 1;
            b.begin_step(&step)
        }),
        ("a block table that is too short", |b| {
            let mut step = plain_step(2);
            step.segments[0].start = 63;
            b.begin_step(&step)
        }),
        ("a position that overflows", |b| {
            let mut step = plain_step(2);
            step.segments[0].start = usize::MAX;
            b.begin_step(&step)
        }),
        ("a block past the cache", |b| append(b, 7, 0)),
        ("a layer past the cache", |b| append(b, 0, 3)),
        ("an unknown cache", |b| b.copy_block(Cache(5), 0, 0)),
        ("copying a block past the cache", |b| {
            let cache = b.alloc_cache(CacheShape {
                layers: 1,
                blocks: 2,
                latent: 2,
                rope: 2,
                format: CacheFormat::F32,
            })?;
            b.copy_block(cache, 0, 2)
        }),
        ("values that are no whole rows", |b| {
            let x = b.alloc(2, 3)?;
            b.write(&[1.0; 4], x)
        }),
        ("reading more rows than there are", |b| {
            let x = b.alloc(2, 3)?;
            b.read(x, 3).map(|_| ())
        }),
        ("gathering a row past the end", |b| {
            let x = buffer_of(b, &[1.0; 6], 3)?;
            let out = b.alloc(1, 3)?;
            b.begin_step(&plain_step(1))?;
            b.gather_rows(x, &[2], out)
        }),
        ("more experts kept than there are", |b| {
            let gate = b.load_matrix(HostMatrix::from_f32(4, 2, &[1.0; 8])?)?;
            let x = b.alloc(1, 2)?;
            let out = b.alloc_routing(1, 5)?;
            b.begin_step(&plain_step(1))?;
            let shape = RouterShape {
                experts: 4,
                top_k: 5,
                groups: 1,
                groups_kept: 1,
                group_score: GroupScore::Max,
                scoring: Scoring::Softmax,
                normalize: false,
                scale: 1.0,
            };
            b.route(&shape, x, gate, None, out)
        }),
        ("an empty buffer", |b| b.alloc(0, 4).map(|_| ())),
        ("a buffer past the address space", |b| b.alloc(usize::MAX, 8).map(|_| ())),
    ]
}

fn append(b: &mut dyn Backend, block: u32, layer: usize) -> Result<(), Error> {
    let shape = MlaShape { heads: 1, nope: 2, rope: 2, value: 2, latent: 2, softmax_scale: 1.0 };
    let cache =
        b.alloc_cache(CacheShape { layers: 3, blocks: 7, latent: 2, rope: 2, format: CacheFormat::F32 })?;
    let norm = b.load_vector(&[1.0; 2])?;
    let rope = b.load_rope(&[1.0], 1.0)?;
    let kv = b.alloc(1, 4)?;
    b.begin_step(&StepInput {
        tokens: vec![0],
        segments: vec![Segment { row: 0, rows: 1, start: 0, first_block: 0, mode: AttendMode::Absorbed }],
        blocks: vec![block],
    })?;
    b.mla_append(&shape, rope, norm, 1e-6, kv, cache, layer)
}

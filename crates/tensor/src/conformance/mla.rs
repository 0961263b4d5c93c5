//! `mla_append`, `mla_attend`, `copy_block`: sequences of mixed lengths over scrambled block tables.

use super::{Case, Invariance, Random, Rows, buffer_of, read_rows, rope::frequencies};
use crate::{
    Backend, DType, Error,
    backend::{
        AttendMode, BLOCK_TOKENS, Buffer, Cache, CacheShape, MlaShape, Rope, Segment, StepInput, Vector,
        Weight,
    },
};

const LAYERS: usize = 2;
const BLOCKS: usize = 24;
const TABLE: usize = 6;

const SHAPES: [MlaShape; 4] = [
    MlaShape { heads: 1, nope: 1, rope: 2, value: 1, latent: 1, softmax_scale: 0.7 },
    MlaShape { heads: 3, nope: 5, rope: 6, value: 7, latent: 9, softmax_scale: 0.3 },
    MlaShape { heads: 4, nope: 24, rope: 64, value: 20, latent: 40, softmax_scale: 0.2 },
    MlaShape { heads: 6, nope: 64, rope: 32, value: 64, latent: 128, softmax_scale: 0.1 },
];

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for shape in SHAPES {
        for dtype in DType::ALL.into_iter().filter(|d| d.row_bytes(shape.latent).is_some()) {
            for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
                let name =
                    format!("mla_attend {mode:?} {dtype} {} heads latent {}", shape.heads, shape.latent);
                all.push(Case::new(name, 2e-5, move |b, r| {
                    let mut layer = Layer::new(b, r, shape, dtype)?;
                    layer.sequences(
                        b,
                        r,
                        &[(70, 3), (0, 1), (129, 1), (0, 66), (63, 2)],
                        mode,
                        Rows::Together,
                    )
                }));
            }
        }
    }
    all.push(Case::new("mla_attend with large scores", 2e-4, |b, r| {
        let mut layer = Layer::new(b, r, MlaShape { softmax_scale: 40.0, ..SHAPES[2] }, DType::F32)?;
        layer.sequences(b, r, &[(100, 5)], AttendMode::Absorbed, Rows::Together)
    }));
    all.push(Case::new("copy_block", 2e-5, copy_block));
}

/// One attention layer with its cache.
struct Layer {
    shape: MlaShape,
    kv_b: Weight,
    norm: Vector,
    rope: Rope,
    cache: Cache,
    kv: Buffer,
    q: Buffer,
    out: Buffer,
}

impl Layer {
    fn new(b: &mut dyn Backend, random: &mut Random, shape: MlaShape, dtype: DType) -> Result<Self, Error> {
        let rows = 160;
        Ok(Self {
            shape,
            kv_b: b.load_matrix(random.matrix(
                dtype,
                shape.heads * (shape.nope + shape.value),
                shape.latent,
            )?)?,
            norm: b.load_vector(&random.normals(shape.latent))?,
            rope: b.load_rope(&frequencies(shape.rope), 0.9)?,
            cache: b.alloc_cache(CacheShape {
                layers: LAYERS,
                blocks: BLOCKS,
                latent: shape.latent,
                rope: shape.rope,
            })?,
            kv: buffer_of(b, &vec![0.0; rows * (shape.latent + shape.rope)], shape.latent + shape.rope)?,
            q: b.alloc(rows, shape.heads * (shape.nope + shape.rope))?,
            out: b.alloc(rows, shape.heads * shape.value)?,
        })
    }

    /// Appends and attends one step's rows in layer 1.
    fn run(
        &mut self,
        b: &mut dyn Backend,
        step: &StepInput,
        kv: &[f32],
        q: &[f32],
    ) -> Result<Vec<f32>, Error> {
        let rows = step.tokens.len();
        b.write(kv, self.kv)?;
        b.write(q, self.q)?;
        b.begin_step(step)?;
        b.rope_queries(&self.shape, self.rope, self.q)?;
        b.mla_append(&self.shape, self.rope, self.norm, 1e-6, self.kv, self.cache, 1)?;
        b.mla_attend(&self.shape, self.q, self.kv_b, self.cache, 1, self.out)?;
        read_rows(b, self.out, rows, self.shape.heads * self.shape.value)
    }

    /// For sequences of `(tokens before, tokens now)`: fills the cache with the former, one sequence at a time,
    /// then attends the latter, in one step or in a step each, row by row.
    fn sequences(
        &mut self,
        b: &mut dyn Backend,
        random: &mut Random,
        lengths: &[(usize, usize)],
        mode: AttendMode,
        rows: Rows,
    ) -> Result<Vec<f32>, Error> {
        let (kv_width, q_width) =
            (self.shape.latent + self.shape.rope, self.shape.heads * (self.shape.nope + self.shape.rope));
        let order = random.permutation(BLOCKS);
        let mut steps = Vec::new();
        for (i, &(before, now)) in lengths.iter().enumerate() {
            // Tables of equal length; the sequences here never need more than 3 of the 4 blocks they may take.
            let table = &order[i * 4..i * 4 + 4];
            for p in (0..before).step_by(BLOCK_TOKENS) {
                let n = BLOCK_TOKENS.min(before - p);
                let (kv, q) = (random.normals(n * kv_width), random.normals(n * q_width));
                self.run(b, &step_of(&[(p, n, table)], AttendMode::Absorbed), &kv, &q)?;
            }
            steps.push((before, now, table, random.normals(now * kv_width), random.normals(now * q_width)));
        }
        if rows == Rows::Together {
            let (mut kv, mut q) = (Vec::new(), Vec::new());
            for s in &steps {
                kv.extend_from_slice(&s.3);
                q.extend_from_slice(&s.4);
            }
            let all: Vec<_> = steps.iter().map(|s| (s.0, s.1, s.2)).collect();
            return self.run(b, &step_of(&all, mode), &kv, &q);
        }
        let mut out = Vec::new();
        for (before, now, table, kv, q) in &steps {
            for r in 0..*now {
                let step = step_of(&[(before + r, 1, table)], mode);
                let (kv, q) = (&kv[r * kv_width..][..kv_width], &q[r * q_width..][..q_width]);
                out.extend(self.run(b, &step, kv, q)?);
            }
        }
        Ok(out)
    }
}

/// A step of sequences `(start, rows, block table)`.
fn step_of(sequences: &[(usize, usize, &[u32])], mode: AttendMode) -> StepInput {
    let mut step = StepInput::default();
    for &(start, rows, table) in sequences {
        let row = step.tokens.len();
        step.tokens.resize(row + rows, 0);
        step.segments.push(Segment { row, rows, start, first_block: step.blocks.len(), mode });
        step.blocks.extend_from_slice(table);
    }
    step
}

fn copy_block(b: &mut dyn Backend, random: &mut Random) -> Result<Vec<f32>, Error> {
    let shape = SHAPES[1];
    let mut layer = Layer::new(b, random, shape, DType::F32)?;
    let (kv_width, q_width) = (shape.latent + shape.rope, shape.heads * (shape.nope + shape.rope));
    let (kv, q) = (random.normals(30 * kv_width), random.normals(30 * q_width));
    layer.run(b, &step_of(&[(0, 30, &[5])], AttendMode::Absorbed), &kv, &q)?;
    b.copy_block(layer.cache, 5, TABLE as u32)?;
    let (kv, q) = (random.normals(kv_width), random.normals(q_width));
    layer.run(b, &step_of(&[(30, 1, &[TABLE as u32])], AttendMode::Absorbed), &kv, &q)
}

pub(super) fn invariance() -> Vec<Invariance> {
    let mut all: Vec<Invariance> = Vec::new();
    for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
        for shape in [SHAPES[2], SHAPES[3]] {
            all.push((
                format!("mla_attend {mode:?} latent {}", shape.latent),
                Box::new(move |b, r, rows| {
                    let mut layer = Layer::new(b, r, shape, DType::F8E4M3)?;
                    layer.sequences(b, r, &[(70, 3), (0, 1), (129, 1), (0, 66), (63, 20)], mode, rows)
                }),
            ));
        }
    }
    all
}

//! `mla_append`, `mla_attend`, `copy_block`: sequences of mixed lengths over scrambled block tables.

use super::{Case, Invariance, Random, Rows, buffer_of, read_rows, rope::frequencies};
use crate::{
    Backend, CacheFormat, DType, Error, HostMatrix,
    backend::{
        AttendMode, BLOCK_TOKENS, Buffer, Cache, CacheShape, KvB, KvBParts, MlaShape, Rope, Segment,
        StepInput, Vector,
    },
    cache::CACHE_RUN,
};

const LAYERS: usize = 2;
const BLOCKS: usize = 28;
const TABLE: usize = 6;
/// Sequences of `(tokens before, tokens now)`.
const LENGTHS: [(usize, usize); 5] = [(70, 3), (0, 1), (129, 1), (0, 66), (63, 2)];

const SHAPES: [MlaShape; 4] = [
    MlaShape { heads: 1, nope: 1, rope: 2, value: 1, latent: 1, softmax_scale: 0.7 },
    MlaShape { heads: 3, nope: 5, rope: 6, value: 7, latent: 9, softmax_scale: 0.3 },
    MlaShape { heads: 4, nope: 24, rope: 64, value: 20, latent: 40, softmax_scale: 0.2 },
    MlaShape { heads: 6, nope: 64, rope: 32, value: 64, latent: 128, softmax_scale: 0.1 },
];

/// Layers whose `kv_b` comes in two parts, and their formats: heads at whole groups of rows and not, rows of whole runs
/// and not, blocks and none.
const APART: [(MlaShape, [DType; 2]); 5] = [
    (SHAPES[3], [DType::Q8_0, DType::Q8_0]),
    (SHAPES[3], [DType::Q4_0, DType::Q5_0]),
    (SHAPES[3], [DType::F16, DType::Q8_0]),
    (MlaShape { heads: 3, nope: 32, rope: 2, value: 20, latent: 32, softmax_scale: 0.2 }, [DType::Q5_1; 2]),
    (
        MlaShape { heads: 18, nope: 160, rope: 6, value: 16, latent: 256, softmax_scale: 0.05 },
        [DType::Q4_0, DType::Q4K],
    ),
];

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for shape in SHAPES {
        for dtype in DType::ALL.into_iter().filter(|d| d.row_bytes(shape.latent).is_some()) {
            for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
                let name =
                    format!("mla_attend {mode:?} {dtype} {} heads latent {}", shape.heads, shape.latent);
                all.push(Case::new(name, 2e-5, move |b, r| {
                    let mut layer = Layer::new(b, r, shape, dtype)?;
                    layer.sequences(b, r, &LENGTHS, mode, Rows::Together)
                }));
            }
        }
    }
    for (shape, parts) in APART {
        for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
            let name = format!("mla_attend {mode:?} kv_b in {} and {}", parts[0], parts[1]);
            all.push(Case::new(name, 2e-5, move |b, r| {
                let mut layer = Layer::apart(b, r, shape, parts)?;
                layer.sequences(b, r, &LENGTHS, mode, Rows::Together)
            }));
        }
    }
    for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
        all.push(Case::new(format!("mla_attend {mode:?} over many positions"), 2e-5, move |b, r| {
            let mut layer = Layer::new(b, r, SHAPES[1], DType::BF16)?;
            layer.sequences(b, r, &[(1030, 3), (511, 1)], mode, Rows::Together)
        }));
    }
    all.push(Case::new("mla_attend with large scores", 2e-4, |b, r| {
        let mut layer = Layer::new(b, r, MlaShape { softmax_scale: 40.0, ..SHAPES[2] }, DType::F32)?;
        layer.sequences(b, r, &[(100, 5)], AttendMode::Absorbed, Rows::Together)
    }));
    add_format_cases(all);
}

/// The formats of the cache.
fn add_format_cases(all: &mut Vec<Case>) {
    // Long enough for two scales in a row.
    let long = MlaShape { heads: 2, nope: 8, rope: 4, value: 6, latent: 160, softmax_scale: 0.1 };
    for format in CacheFormat::ALL {
        for shape in [SHAPES[1], long] {
            for mode in [AttendMode::Absorbed, AttendMode::Expanded] {
                let name = format!("mla_attend {mode:?} latent {}, exact values in {format}", shape.latent);
                all.push(Case::new(name, 2e-5, move |b, r| {
                    let mut layer = Layer::with_exact_values(b, r, shape, format)?;
                    layer.sequences(b, r, &LENGTHS, mode, Rows::Together)
                }));
            }
        }
        // A value next to the middle between two codes may fall to either side.
        let bound = match format {
            CacheFormat::F32 => 2e-5,
            CacheFormat::Bf16 | CacheFormat::Q8_0 => 1e-2,
            CacheFormat::F16 => 2e-3,
            CacheFormat::Fp8 => 0.1,
        };
        all.push(Case::new(format!("mla_attend with a cache in {format}"), bound, move |b, r| {
            let mut layer = Layer::new(b, r, SHAPES[3], DType::BF16)?;
            layer.cache = b.alloc_cache(cache_shape(&layer.shape, format))?;
            layer.sequences(b, r, &LENGTHS, AttendMode::Absorbed, Rows::Together)
        }));
        let name = format!("copy_block of {format}");
        all.push(Case::new(name, 2e-5, move |b, r| copy_block(b, r, format)));
    }
}

fn cache_shape(shape: &MlaShape, format: CacheFormat) -> CacheShape {
    CacheShape { layers: LAYERS, blocks: BLOCKS, latent: shape.latent, rope: shape.rope, format }
}

/// `[H*(dn+dv), kl]` from its parts, in F32.
fn together(shape: &MlaShape, parts: &KvBParts) -> Result<HostMatrix, Error> {
    let MlaShape { heads, nope, value, latent, .. } = *shape;
    let (mut all, mut column, mut row) =
        (vec![0.0; heads * (nope + value) * latent], vec![0.0; nope], vec![0.0; latent]);
    for (head, all) in all.chunks_exact_mut((nope + value) * latent).enumerate() {
        let (key_rows, value_rows) = all.split_at_mut(nope * latent);
        for c in 0..latent {
            parts.keys.decode_row(head * latent + c, &mut column);
            key_rows[c..].iter_mut().step_by(latent).zip(&column).for_each(|(to, x)| *to = *x);
        }
        for (i, to) in value_rows.chunks_exact_mut(latent).enumerate() {
            parts.values.decode_row(head * value + i, &mut row);
            to.copy_from_slice(&row);
        }
    }
    HostMatrix::from_f32(heads * (nope + value), latent, &all)
}

/// One attention layer with its cache.
struct Layer {
    shape: MlaShape,
    kv_b: KvB,
    norm: Vector,
    rope: Rope,
    cache: Cache,
    kv: Buffer,
    q: Buffer,
    out: Buffer,
    /// Latent values before the norm are 1 or -1, and nothing rotates.
    exact_values: bool,
}

impl Layer {
    fn new(b: &mut dyn Backend, random: &mut Random, shape: MlaShape, dtype: DType) -> Result<Self, Error> {
        let kv_b = random.matrix(dtype, shape.heads * (shape.nope + shape.value), shape.latent)?;
        let (kv_b, norm) = (b.load_kv_b(&shape, kv_b)?, random.normals(shape.latent));
        Self::with(b, shape, kv_b, &norm, CacheFormat::F32, false)
    }

    /// A layer whose `kv_b` comes in two parts.
    fn apart(
        b: &mut dyn Backend,
        random: &mut Random,
        shape: MlaShape,
        [keys, values]: [DType; 2],
    ) -> Result<Self, Error> {
        let keys = random.matrix(keys, shape.heads * shape.latent, shape.nope)?;
        let values = random.matrix(values, shape.heads * shape.value, shape.latent)?;
        let parts = KvBParts { keys, values };
        let kv_b = b.load_kv_b_apart(&shape, together(&shape, &parts)?, parts)?;
        // Near 1, as trained ones are: else a latent row has outliers, which rounding to bytes suffers from.
        let norm: Vec<f32> = random.normals(shape.latent).iter().map(|n| 1.0 + 0.1 * n).collect();
        Self::with(b, shape, kv_b, &norm, CacheFormat::F32, false)
    }

    /// A layer whose cache rows are values that `format` keeps, so that rounding cannot fall to either side.
    fn with_exact_values(
        b: &mut dyn Backend,
        random: &mut Random,
        shape: MlaShape,
        format: CacheFormat,
    ) -> Result<Self, Error> {
        let kv_b = random.matrix(DType::F32, shape.heads * (shape.nope + shape.value), shape.latent)?;
        let mut norm = Vec::new();
        for i in 0..shape.latent {
            let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
            // The largest of each run makes its scale a power of two.
            norm.push(match (format, i % CACHE_RUN) {
                (CacheFormat::Fp8, 0) => sign * 1.75,
                (CacheFormat::Fp8, _) => sign * (8 + random.below(6)) as f32 / (8 << random.below(5)) as f32,
                (_, 0) => sign * 127.0 / 64.0,
                _ => sign * random.below(128) as f32 / 64.0,
            });
        }
        let kv_b = b.load_kv_b(&shape, kv_b)?;
        Self::with(b, shape, kv_b, &norm, format, true)
    }

    fn with(
        b: &mut dyn Backend,
        shape: MlaShape,
        kv_b: KvB,
        norm: &[f32],
        format: CacheFormat,
        exact_values: bool,
    ) -> Result<Self, Error> {
        let rows = 160;
        let still = vec![0.0; shape.rope / 2];
        Ok(Self {
            shape,
            kv_b,
            norm: b.load_vector(norm)?,
            rope: if exact_values {
                b.load_rope(&still, 1.0)?
            } else {
                b.load_rope(&frequencies(shape.rope), 0.9)?
            },
            cache: b.alloc_cache(cache_shape(&shape, format))?,
            kv: buffer_of(b, &vec![0.0; rows * (shape.latent + shape.rope)], shape.latent + shape.rope)?,
            q: b.alloc(rows, shape.heads * (shape.nope + shape.rope))?,
            out: b.alloc(rows, shape.heads * shape.value)?,
            exact_values,
        })
    }

    /// New latent rows before norm and rotation.
    fn latents(&self, random: &mut Random, rows: usize) -> Vec<f32> {
        let width = self.shape.latent + self.shape.rope;
        let mut values = random.normals(rows * width);
        if self.exact_values {
            for (i, v) in values.iter_mut().enumerate() {
                let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
                let latent = i % width < self.shape.latent;
                *v = if latent { sign } else { sign * random.below(128) as f32 / 64.0 };
            }
        }
        values
    }

    /// Appends one step's rows to layer 1.
    fn append(&mut self, b: &mut dyn Backend, step: &StepInput, kv: &[f32]) -> Result<(), Error> {
        b.write(kv, self.kv)?;
        b.begin_step(step)?;
        b.mla_append(&self.shape, self.rope, self.norm, 1e-6, self.kv, self.cache, 1)
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
        b.write(q, self.q)?;
        self.append(b, step, kv)?;
        b.rope_queries(&self.shape, self.rope, self.q)?;
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
        let mut order = order.as_slice();
        for &(before, now) in lengths {
            // One block more than the sequence needs: a table may be longer.
            let (table, others) = order.split_at((before + now).div_ceil(BLOCK_TOKENS) + 1);
            order = others;
            for p in (0..before).step_by(BLOCK_TOKENS) {
                let n = BLOCK_TOKENS.min(before - p);
                let kv = self.latents(random, n);
                self.append(b, &step_of(&[(p, n, table)], AttendMode::Absorbed), &kv)?;
            }
            steps.push((before, now, table, self.latents(random, now), random.normals(now * q_width)));
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

fn copy_block(b: &mut dyn Backend, random: &mut Random, format: CacheFormat) -> Result<Vec<f32>, Error> {
    let shape = SHAPES[1];
    let mut layer = Layer::with_exact_values(b, random, shape, format)?;
    let q_width = shape.heads * (shape.nope + shape.rope);
    let kv = layer.latents(random, 30);
    layer.append(b, &step_of(&[(0, 30, &[5])], AttendMode::Absorbed), &kv)?;
    b.copy_block(layer.cache, 5, TABLE as u32)?;
    let (kv, q) = (layer.latents(random, 1), random.normals(q_width));
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
        all.push((
            format!("mla_attend {mode:?} kv_b in parts"),
            Box::new(move |b, r, rows| {
                let mut layer = Layer::apart(b, r, SHAPES[3], [DType::Q4_0, DType::Q8_0])?;
                layer.sequences(b, r, &[(70, 3), (0, 1), (129, 1), (0, 66), (63, 20)], mode, rows)
            }),
        ));
    }
    all
}

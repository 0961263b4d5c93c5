//! How fast attention runs over the latent cache, by depth, form and format of the cache:
//! `cargo run --release -p oxseek-backend-cpu --example attention [THREADS] [HEADS] [DEPTH,DEPTH...] [FORMAT,...]`.
//!
//! The shape is that of DeepSeek V2 and V3 but for the number of heads. Layers take turns, so that a deep cache comes
//! from memory, as it does in a model.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use std::time::Instant;

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level, Precision};
use oxseek_tensor::{
    Backend, CacheFormat, DType,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, Cache, CacheShape, KvB, MlaShape, Segment, StepInput},
    conformance::Random,
};

const LAYERS: usize = 4;
const ROWS_MAX: usize = 2048;
/// Rows of a step and their form.
const STEPS: [(usize, AttendMode); 8] = [
    (1, AttendMode::Absorbed),
    (8, AttendMode::Absorbed),
    (64, AttendMode::Absorbed),
    (64, AttendMode::Expanded),
    (256, AttendMode::Absorbed),
    (256, AttendMode::Expanded),
    (512, AttendMode::Expanded),
    (2048, AttendMode::Expanded),
];

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().map_or(2, |t| t.parse().unwrap());
    let heads = args.next().map_or(16, |h| h.parse().unwrap());
    let list = |arg: Option<String>, all: &str| -> Vec<String> {
        arg.as_deref().unwrap_or(all).split(',').map(str::to_string).collect()
    };
    let depths = list(args.next(), "0,512,4096,16384");
    let formats = list(args.next(), "bf16,f16,q8_0,fp8");
    let rows = list(args.next(), "1,8,64,256,512,2048");
    let level: Option<Level> = args.next().map(|l| l.parse().unwrap());
    println!("| cache | depth  | rows | form     | us a layer | GB/s  | GOP/s |");
    println!("|-------|--------|------|----------|------------|-------|-------|");
    for format in CacheFormat::ALL.into_iter().filter(|f| formats.iter().any(|n| n == f.name())) {
        let depths: Vec<usize> = depths.iter().map(|d| d.parse().unwrap()).collect();
        let mut layer = Layers::new(threads, heads, level, format, depths.iter().copied().max().unwrap());
        for depth in depths {
            for (n, mode) in STEPS.into_iter().filter(|s| rows.iter().any(|r| *r == s.0.to_string())) {
                layer.measure(depth, n, mode);
            }
        }
    }
}

struct Layers {
    b: CpuBackend,
    shape: MlaShape,
    format: CacheFormat,
    kv_bs: Vec<KvB>,
    cache: Cache,
    q: Buffer,
    out: Buffer,
}

impl Layers {
    fn new(threads: usize, heads: usize, level: Option<Level>, format: CacheFormat, depth: usize) -> Self {
        let shape = MlaShape {
            heads,
            nope: 128,
            rope: 64,
            value: 128,
            latent: 512,
            softmax_scale: 192f32.powf(-0.5),
        };
        let options = CpuOptions { threads: Some(threads), level, precision: Precision::Native };
        let (mut b, mut random) = (CpuBackend::new(options).unwrap(), Random::new(1));
        let blocks = (depth + ROWS_MAX).div_ceil(BLOCK_TOKENS);
        let cache = CacheShape { layers: LAYERS, blocks, latent: shape.latent, rope: shape.rope, format };
        let width = shape.latent + shape.rope;
        let kv_bs = (0..LAYERS)
            .map(|_| {
                let m = random.matrix(DType::BF16, heads * (shape.nope + shape.value), shape.latent).unwrap();
                b.load_kv_b(&shape, m).unwrap()
            })
            .collect();
        let made = Self {
            cache: b.alloc_cache(cache).unwrap(),
            q: b.alloc(ROWS_MAX, heads * (shape.nope + shape.rope)).unwrap(),
            out: b.alloc(ROWS_MAX, heads * shape.value).unwrap(),
            b,
            shape,
            format,
            kv_bs,
        };
        made.filled(&mut random, depth + ROWS_MAX, width)
    }

    /// With random rows in the cache and random queries.
    fn filled(mut self, random: &mut Random, tokens: usize, width: usize) -> Self {
        let norm = self.b.load_vector(&vec![1.0; self.shape.latent]).unwrap();
        let rope = self.b.load_rope(&vec![0.01; self.shape.rope / 2], 1.0).unwrap();
        let kv = self.b.alloc(BLOCK_TOKENS, width).unwrap();
        for start in (0..tokens).step_by(BLOCK_TOKENS) {
            self.b.write(&random.normals(BLOCK_TOKENS * width), kv).unwrap();
            self.b.begin_step(&step(start, BLOCK_TOKENS, AttendMode::Absorbed)).unwrap();
            for layer in 0..LAYERS {
                self.b.mla_append(&self.shape, rope, norm, 1e-6, kv, self.cache, layer).unwrap();
            }
        }
        let q = random.normals(ROWS_MAX * self.shape.heads * (self.shape.nope + self.shape.rope));
        self.b.write(&q, self.q).unwrap();
        self
    }

    fn measure(&mut self, depth: usize, n: usize, mode: AttendMode) {
        self.b.begin_step(&step(depth, n, mode)).unwrap();
        let mut best = f64::INFINITY;
        self.b.take_profile();
        let (mut runs, since) = (0, Instant::now());
        while runs < 3 || since.elapsed().as_secs_f64() < 0.3 {
            let start = Instant::now();
            for layer in 0..LAYERS {
                self.b
                    .mla_attend(&self.shape, self.q, self.kv_bs[layer], self.cache, layer, self.out)
                    .unwrap();
            }
            best = best.min(start.elapsed().as_secs_f64() / LAYERS as f64);
            runs += 1;
        }
        let cost = self.b.take_profile().into_iter().find(|c| c.op == "mla_attend").unwrap();
        let per_call = |v: u64| v as f64 / cost.calls as f64;
        println!(
            "| {:<5} | {depth:>6} | {n:>4} | {mode:?} | {:>10.1} | {:>5.1} | {:>5.0} |",
            self.format.name(),
            best * 1e6,
            per_call(cost.bytes) / best / 1e9,
            2.0 * per_call(cost.attention.total() + cost.weights.total()) / best / 1e9,
        );
    }
}

/// `rows` rows of one sequence after `depth` others.
fn step(depth: usize, rows: usize, mode: AttendMode) -> StepInput {
    StepInput {
        tokens: vec![0; rows],
        blocks: (0..(depth + rows).div_ceil(BLOCK_TOKENS) as u32).collect(),
        segments: vec![Segment { row: 0, rows, start: depth, first_block: 0, mode }],
    }
}

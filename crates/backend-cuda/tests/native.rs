//! Native precision on the first CUDA device, where there is one: near the reference, and each row by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_backend_cuda::{CudaBackend, CudaOptions, Precision};
use oxseek_tensor::{
    Backend, CacheFormat, DType,
    backend::{
        AttendMode, BLOCK_TOKENS, CacheShape, ExpertMatrices, GroupScore, MlaShape, Mlp, RouterShape,
        Scoring, Segment, StepInput, read_now,
    },
    conformance::{Random, check_row_invariance},
    dtype::{bf16_to_f32, f32_to_bf16},
    reference::ReferenceBackend,
};

const ROUTER: RouterShape = RouterShape {
    experts: 16,
    top_k: 4,
    groups: 4,
    groups_kept: 2,
    group_score: GroupScore::TopTwoSum,
    scoring: Scoring::Sigmoid,
    normalize: true,
    scale: 1.0,
};
const MLA: MlaShape = MlaShape { heads: 32, nope: 48, rope: 32, value: 40, latent: 256, softmax_scale: 0.1 };
/// The sizes for which rows of prompts have kernels of their own.
const DEEPSEEK: MlaShape =
    MlaShape { heads: 16, nope: 128, rope: 64, value: 128, latent: 512, softmax_scale: 0.1 };

fn native() -> Option<CudaBackend> {
    let options = CudaOptions { precision: Precision::Native, ..CudaOptions::default() };
    CudaBackend::new(options).inspect_err(|e| println!("not run: {e}")).ok()
}

fn step(start: usize, rows: usize) -> StepInput {
    let blocks = (0..(start + rows).div_ceil(BLOCK_TOKENS) as u32).rev().collect();
    let segment = Segment { row: 0, rows, start, first_block: 0, mode: AttendMode::Absorbed };
    StepInput { tokens: vec![0; rows], segments: vec![segment], blocks }
}

/// Values that BF16 holds, so that rounding them changes nothing.
fn held(random: &mut Random, n: usize) -> Vec<f32> {
    random.normals(n).iter().map(|v| bf16_to_f32(f32_to_bf16(*v))).collect()
}

/// `x W^T` for `rows` rows, `together` at a time.
fn product(b: &mut dyn Backend, dtype: DType, [n, k]: [usize; 2], rows: usize, together: usize) -> Vec<f32> {
    let mut random = Random::new(3);
    let w = b.load_matrix(random.matrix(dtype, n, k).unwrap()).unwrap();
    let values = held(&mut random, rows * k);
    let (x, y) = (b.alloc(together, k).unwrap(), b.alloc(together, n).unwrap());
    let mut all = Vec::new();
    for chunk in values.chunks(together * k) {
        let rows = chunk.len() / k;
        b.write(chunk, x).unwrap();
        b.begin_step(&step(0, rows)).unwrap();
        b.matmul(x, w, y, rows).unwrap();
        b.matmul_add(x, w, y, rows).unwrap();
        let mut out = vec![0.0; rows * n];
        read_now(b, y, rows, &mut out).unwrap();
        all.extend(out);
    }
    all
}

/// A dense feed-forward, a norm and a routed one.
fn feed_forward(b: &mut dyn Backend, dtype: DType, rows: usize, together: usize) -> Vec<f32> {
    const WIDTH: usize = 384;
    let mut random = Random::new(4);
    let mut three = |inner: usize| {
        let mut matrix = |n, k| random.matrix(dtype, n, k).unwrap();
        ExpertMatrices { gate: matrix(inner, WIDTH), up: matrix(inner, WIDTH), down: matrix(WIDTH, inner) }
    };
    let [dense, shared] = [704, 256].map(|inner| {
        let m = three(inner);
        let mut load = |m| b.load_matrix(m).unwrap();
        Mlp { gate: load(m.gate), up: load(m.up), down: load(m.down) }
    });
    let experts = b.load_experts((0..ROUTER.experts).map(|_| three(128)).collect()).unwrap();
    let gate = b.load_matrix(random.matrix(DType::F32, ROUTER.experts, WIDTH).unwrap()).unwrap();
    let norm = b.load_vector(&random.normals(WIDTH)).unwrap();
    let values = held(&mut random, rows * WIDTH);
    let [x, h, y] = [(); 3].map(|()| b.alloc(together, WIDTH).unwrap());
    let routing = b.alloc_routing(together, ROUTER.top_k).unwrap();
    let mut all = Vec::new();
    for chunk in values.chunks(together * WIDTH) {
        let rows = chunk.len() / WIDTH;
        b.write(chunk, x).unwrap();
        b.write(chunk, y).unwrap();
        b.begin_step(&step(0, rows)).unwrap();
        b.mlp(x, &dense, y).unwrap();
        b.rms_norm(x, norm, 1e-6, h, rows).unwrap();
        b.route(&ROUTER, h, gate, None, routing).unwrap();
        b.moe(h, routing, experts, Some(&shared), y).unwrap();
        let mut out = vec![0.0; rows * WIDTH];
        read_now(b, y, rows, &mut out).unwrap();
        all.extend(out);
    }
    all
}

/// The cache of one layer and one sequence.
fn cache_of(shape: &MlaShape, tokens: usize) -> CacheShape {
    let MlaShape { latent, rope, .. } = *shape;
    CacheShape { layers: 1, blocks: tokens.div_ceil(BLOCK_TOKENS), latent, rope, format: CacheFormat::Bf16 }
}

/// Attention of the last `rows` rows of a sequence of `length`.
fn attention(b: &mut dyn Backend, mla: &MlaShape, length: usize, rows: usize, together: usize) -> Vec<f32> {
    let mut random = Random::new(5);
    let (width, q_width) = (mla.latent + mla.rope, mla.heads * (mla.nope + mla.rope));
    let kv_b = random.matrix(DType::BF16, mla.heads * (mla.nope + mla.value), mla.latent).unwrap();
    let kv_b = b.load_kv_b(mla, kv_b).unwrap();
    let norm = b.load_vector(&random.normals(mla.latent)).unwrap();
    let rope = b.load_rope(&vec![0.3; mla.rope / 2], 1.0).unwrap();
    let cache = b.alloc_cache(cache_of(mla, length)).unwrap();
    let (kv, q) = (b.alloc(length, width).unwrap(), b.alloc(together, q_width).unwrap());
    let y = b.alloc(together, mla.heads * mla.value).unwrap();
    let mut whole = step(0, length);
    b.write(&random.normals(length * width), kv).unwrap();
    b.begin_step(&whole).unwrap();
    b.mla_append(mla, rope, norm, 1e-6, kv, cache, 0).unwrap();
    let mut all = Vec::new();
    for (i, chunk) in held(&mut random, rows * q_width).chunks(together * q_width).enumerate() {
        let n = chunk.len() / q_width;
        whole.tokens = vec![0; n];
        whole.segments[0] = Segment { rows: n, start: length - rows + i * together, ..whole.segments[0] };
        b.write(chunk, q).unwrap();
        b.begin_step(&whole).unwrap();
        b.mla_attend(mla, q, kv_b, cache, 0, y).unwrap();
        let mut out = vec![0.0; n * mla.heads * mla.value];
        read_now(b, y, n, &mut out).unwrap();
        all.extend(out);
    }
    all
}

/// Sequences of so many rows behind so many others, in one step, or row by row.
fn sequences(b: &mut dyn Backend, lengths: &[(usize, usize)], at_once: bool) -> Vec<f32> {
    let mla = &DEEPSEEK;
    let (width, q_width) = (mla.latent + mla.rope, mla.heads * (mla.nope + mla.rope));
    let mut random = Random::new(7);
    let kv_b = random.matrix(DType::BF16, mla.heads * (mla.nope + mla.value), mla.latent).unwrap();
    let kv_b = b.load_kv_b(mla, kv_b).unwrap();
    let norm = b.load_vector(&random.normals(mla.latent)).unwrap();
    let rope = b.load_rope(&vec![0.3; mla.rope / 2], 1.0).unwrap();
    let rows_of_all = lengths.iter().map(|l| l.1).sum();
    let longest = lengths.iter().map(|l| l.0 + l.1).max().unwrap();
    let blocks = longest.div_ceil(BLOCK_TOKENS);
    let cache = b.alloc_cache(cache_of(mla, BLOCK_TOKENS * blocks * lengths.len())).unwrap();
    let (kv, q) = (b.alloc(longest, width).unwrap(), b.alloc(rows_of_all, q_width).unwrap());
    let y = b.alloc(rows_of_all, mla.heads * mla.value).unwrap();
    let (mut whole, mut inputs) = (StepInput::default(), Vec::new());
    for (i, &(start, rows)) in lengths.iter().enumerate() {
        let first_block = whole.blocks.len();
        whole.blocks.extend((i * blocks..(i + 1) * blocks).rev().map(|b| b as u32));
        let mut earlier = step(0, start + rows);
        earlier.blocks = whole.blocks[first_block..].to_vec();
        b.write(&random.normals((start + rows) * width), kv).unwrap();
        b.begin_step(&earlier).unwrap();
        b.mla_append(mla, rope, norm, 1e-6, kv, cache, 0).unwrap();
        let row = whole.tokens.len();
        whole.tokens.extend(vec![0; rows]);
        let mode = AttendMode::Absorbed;
        whole.segments.push(Segment { row, rows, start, first_block, mode });
        inputs.extend(
            (0..rows).map(|r| step(start + r, 1)).map(|s| StepInput { blocks: earlier.blocks.clone(), ..s }),
        );
    }
    let values = held(&mut random, rows_of_all * q_width);
    let steps = if at_once { vec![whole] } else { inputs };
    let mut all = Vec::new();
    for (input, values) in steps.iter().zip(values.chunks(values.len() / steps.len())) {
        let n = input.tokens.len();
        b.write(values, q).unwrap();
        b.begin_step(input).unwrap();
        b.mla_attend(mla, q, kv_b, cache, 0, y).unwrap();
        let mut out = vec![0.0; n * mla.heads * mla.value];
        read_now(b, y, n, &mut out).unwrap();
        all.extend(out);
    }
    all
}

/// A layer and the next one's norm, op after op as the model asks for them, of a sequence that begins with the first
/// row: ops that follow each other are launched together. The router reads rows of its own, so that no rounding changes
/// its choices.
fn layer(b: &mut dyn Backend, dtype: DType, rows: usize, together: usize) -> Vec<f32> {
    const WIDTH: usize = 384;
    let mut random = Random::new(6);
    let (q_width, kv_width) = (MLA.heads * (MLA.nope + MLA.rope), MLA.latent + MLA.rope);
    let attended = MLA.heads * MLA.value;
    let sizes = [[q_width, WIDTH], [kv_width, WIDTH], [WIDTH, attended]];
    let [w_q, w_kv, w_o] = sizes.map(|[n, k]| b.load_matrix(random.matrix(dtype, n, k).unwrap()).unwrap());
    let kv_b = random.matrix(DType::BF16, MLA.heads * (MLA.nope + MLA.value), MLA.latent).unwrap();
    let kv_b = b.load_kv_b(&MLA, kv_b).unwrap();
    let mut three = |inner: usize| {
        let mut matrix = |n, k| random.matrix(dtype, n, k).unwrap();
        ExpertMatrices { gate: matrix(inner, WIDTH), up: matrix(inner, WIDTH), down: matrix(WIDTH, inner) }
    };
    let shared = three(256);
    let experts = b.load_experts((0..ROUTER.experts).map(|_| three(128)).collect()).unwrap();
    let mut load = |m| b.load_matrix(m).unwrap();
    let shared = Mlp { gate: load(shared.gate), up: load(shared.up), down: load(shared.down) };
    let gate = b.load_matrix(random.matrix(DType::F32, ROUTER.experts, WIDTH).unwrap()).unwrap();
    let [norm, ffn_norm, next_norm] = [(); 3].map(|()| b.load_vector(&random.normals(WIDTH)).unwrap());
    let kv_norm = b.load_vector(&random.normals(MLA.latent)).unwrap();
    let rope = b.load_rope(&[0.3; 16], 1.0).unwrap();
    let cache = b.alloc_cache(cache_of(&MLA, rows)).unwrap();
    let [x, routed, h, q, kv, y] =
        [WIDTH, WIDTH, WIDTH, q_width, kv_width, attended].map(|cols| b.alloc(together, cols).unwrap());
    let routing = b.alloc_routing(together, ROUTER.top_k).unwrap();
    let (values, of_router) = (held(&mut random, rows * WIDTH), random.normals(rows * WIDTH));
    let mut all = Vec::new();
    for (i, chunk) in values.chunks(together * WIDTH).enumerate() {
        let (n, first) = (chunk.len() / WIDTH, i * together);
        b.write(chunk, x).unwrap();
        b.write(&of_router[first * WIDTH..(first + n) * WIDTH], routed).unwrap();
        let input = StepInput { blocks: step(0, rows).blocks, ..step(first, n) };
        b.begin_step(&input).unwrap();
        b.rms_norm(x, norm, 1e-6, h, n).unwrap();
        b.matmul(h, w_q, q, n).unwrap();
        b.matmul(h, w_kv, kv, n).unwrap();
        b.rope_queries(&MLA, rope, q).unwrap();
        b.mla_append(&MLA, rope, kv_norm, 1e-6, kv, cache, 0).unwrap();
        b.mla_attend(&MLA, q, kv_b, cache, 0, y).unwrap();
        b.matmul_add(y, w_o, x, n).unwrap();
        b.rms_norm(x, ffn_norm, 1e-6, h, n).unwrap();
        b.route(&ROUTER, routed, gate, None, routing).unwrap();
        b.moe(h, routing, experts, Some(&shared), x).unwrap();
        b.rms_norm(x, next_norm, 1e-6, h, n).unwrap();
        let mut out = vec![0.0; n * WIDTH];
        read_now(b, h, n, &mut out).unwrap();
        all.extend(out);
    }
    all
}

fn check(name: &str, bound: f64, together: usize, run: impl Fn(&mut dyn Backend, usize) -> Vec<f32>) {
    let Some(mut gpu) = native() else { return };
    let found = run(&mut gpu, together);
    let alone = run(&mut native().unwrap(), 1);
    let differ = found.iter().zip(&alone).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!((differ, found.len()), (0, alone.len()), "{name}: values depend on the batch");
    let expected = run(&mut ReferenceBackend::new(), together);
    let square = |v: f64| v * v;
    let rms = (expected.iter().map(|v| square((*v).into())).sum::<f64>() / expected.len() as f64).sqrt();
    let worst = expected.iter().zip(&found).map(|(e, f)| f64::from((e - f).abs())).fold(0.0, f64::max);
    println!("{name}: {:.1e} of {bound:.0e}", worst / rms);
    assert!(found.iter().all(|v| v.is_finite()) && worst / rms <= bound, "{name}: {}", worst / rms);
}

#[test]
fn products() {
    for dtype in [DType::BF16, DType::F8E4M3] {
        for size in [[16, 64], [37, 256], [576, 1408], [130, 2112]] {
            for rows in [7, 16, 30, 64, 130] {
                let run = |b: &mut dyn Backend, together| product(b, dtype, size, rows, together);
                check(&format!("{dtype} {size:?} {rows} rows"), 2e-5, rows, run);
            }
        }
    }
}

#[test]
fn experts() {
    for dtype in [DType::BF16, DType::F8E4M3] {
        for rows in [3, 21, 70] {
            let run = |b: &mut dyn Backend, together| feed_forward(b, dtype, rows, together);
            check(&format!("experts {dtype} {rows} rows"), 3e-2, rows, run);
        }
    }
}

#[test]
fn a_layer_in_one_step() {
    for dtype in [DType::BF16, DType::F8E4M3] {
        for rows in [1, 5, 14, 70] {
            let run = |b: &mut dyn Backend, together| layer(b, dtype, rows, together);
            check(&format!("layer {dtype} {rows} rows"), 5e-2, rows, run);
        }
    }
}

/// The layer itself, where there is no device either: rows of a growing sequence are those of the whole one.
#[test]
fn the_reference_takes_the_layer_row_by_row() {
    let whole = layer(&mut ReferenceBackend::new(), DType::BF16, 70, 70);
    assert_eq!(whole, layer(&mut ReferenceBackend::new(), DType::BF16, 70, 1));
}

#[test]
fn attention_over_blocks() {
    for mla in [MLA, DEEPSEEK] {
        for (length, rows) in [(5, 5), (64, 2), (130, 70), (700, 9)] {
            let run = |b: &mut dyn Backend, together| attention(b, &mla, length, rows, together);
            check(&format!("attention {rows} of {length}, {} heads", mla.heads), 3e-2, rows, run);
        }
    }
}

#[test]
fn sequences_side_by_side() {
    let lengths = [(0, 5), (90, 1), (0, 7), (0, 70), (90, 1)];
    let run = |b: &mut dyn Backend, together| sequences(b, &lengths, together > 1);
    check("sequences side by side", 3e-2, 84, run);
}

/// So many that each row gets a multiprocessor of its own, among them a first token, the ends of blocks and rows whose
/// neighbours are appended in the same step.
#[test]
fn many_sequences_side_by_side() {
    let mut lengths = vec![(0, 1), (63, 1), (64, 1), (127, 1), (128, 1), (61, 3), (126, 3), (700, 1)];
    lengths.extend((0..32).map(|i| (17 * i, 1)));
    let rows = lengths.iter().map(|l| l.1).sum();
    let run = |b: &mut dyn Backend, together| sequences(b, &lengths, together > 1);
    check("many sequences side by side", 3e-2, rows, run);
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    if native().is_some() {
        let report = check_row_invariance(&mut || Box::new(native().unwrap()), 5);
        assert_eq!(report.failures().count(), 0, "{report}");
    }
}

//! Experts that stay in their files give the same bits as those that were packed.
#![allow(clippy::unwrap_used, reason = "a test")]

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level, Precision};
use oxseek_tensor::{
    Backend, DType,
    backend::{
        AttendMode, BLOCK_TOKENS, ExpertMatrices, GroupScore, RouterShape, Scoring, Segment, StepInput,
        read_now,
    },
    conformance::Random,
};

const SHAPE: RouterShape = RouterShape {
    experts: 6,
    top_k: 2,
    groups: 1,
    groups_kept: 1,
    group_score: GroupScore::Max,
    scoring: Scoring::Sigmoid,
    normalize: true,
    scale: 1.0,
};

/// Routed experts of one format applied to `rows` random rows.
fn answer(level: Level, precision: Precision, dtype: DType, rows: usize, on_disk: bool) -> Vec<u32> {
    let (width, inner) = [96usize, 160].map(|n| n.next_multiple_of(dtype.block_len())).into();
    let mut random = Random::new(5);
    let mut b = CpuBackend::new(CpuOptions { threads: Some(2), level: Some(level), precision }).unwrap();
    if on_disk {
        b.leave_experts_on_disk();
    }
    let mut matrix = |rows, cols| random.matrix(dtype, rows, cols).unwrap();
    let experts = (0..SHAPE.experts).map(|_| ExpertMatrices {
        gate: matrix(inner, width),
        up: matrix(inner, width),
        down: matrix(width, inner),
    });
    let experts = b.load_experts(experts.collect()).unwrap();
    let gate = b.load_matrix(random.matrix(DType::F32, SHAPE.experts, width).unwrap()).unwrap();
    b.settle().unwrap();
    let (x, y) = (b.alloc(rows, width).unwrap(), b.alloc(rows, width).unwrap());
    let routing = b.alloc_routing(rows, SHAPE.top_k).unwrap();
    b.write(&random.normals(rows * width), x).unwrap();
    let segment = Segment { row: 0, rows, start: 0, first_block: 0, mode: AttendMode::Absorbed };
    let blocks = (0..rows.div_ceil(BLOCK_TOKENS) as u32).collect();
    b.begin_step(&StepInput { tokens: vec![0; rows], segments: vec![segment], blocks }).unwrap();
    b.route(&SHAPE, x, gate, None, routing).unwrap();
    b.moe(x, routing, experts, None, y).unwrap();
    let mut out = vec![0.0; rows * width];
    read_now(&mut b, y, rows, &mut out).unwrap();
    out.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn results_are_equal_bit_by_bit() {
    for level in Level::available() {
        for dtype in DType::ALL {
            for precision in [Precision::Exact, Precision::Native] {
                for rows in [1, 3, 14] {
                    let packed = answer(level, precision, dtype, rows, false);
                    let on_disk = answer(level, precision, dtype, rows, true);
                    assert!(packed.iter().any(|bits| *bits != 0));
                    assert_eq!(packed, on_disk, "{level} {dtype} {precision:?} {rows} rows");
                }
            }
        }
    }
}

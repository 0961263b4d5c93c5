//! `mlp`, `route`, `moe`.

use super::{Case, Invariance, Random, Rows, buffer_of, plain_step, read_rows};
use crate::{
    Backend, DType, Error, HostMatrix,
    backend::{ExpertMatrices, GroupScore, Mlp, RouterShape, Scoring},
};

const V3: RouterShape = RouterShape {
    experts: 16,
    top_k: 4,
    groups: 4,
    groups_kept: 2,
    group_score: GroupScore::TopTwoSum,
    scoring: Scoring::Sigmoid,
    normalize: true,
    scale: 2.5,
};
const V2: RouterShape = RouterShape {
    experts: 20,
    top_k: 3,
    groups: 5,
    groups_kept: 2,
    group_score: GroupScore::Max,
    scoring: Scoring::Softmax,
    normalize: false,
    scale: 16.0,
};
const LITE: RouterShape = RouterShape { experts: 9, top_k: 6, groups: 1, groups_kept: 1, scale: 1.0, ..V2 };

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for (name, shape, bias) in [("v3", V3, true), ("v2", V2, false), ("lite", LITE, false)] {
        for (rows, width) in [(1, 7), (5, 96), (33, 384)] {
            let name = format!("route {name} {rows} rows of {width}");
            all.push(Case::new(name, 5e-6, move |b, r| route(b, r, shape, bias, rows, width)));
        }
    }
    all.push(Case::new("route with every expert equal", 1e-6, |b, r| {
        let gate = b.load_matrix(HostMatrix::from_f32(16, 8, &[0.0; 128])?)?;
        let x = buffer_of(b, &r.normals(8), 8)?;
        let out = b.alloc_routing(1, 4)?;
        b.begin_step(&plain_step(1))?;
        b.route(&V3, x, gate, None, out)?;
        let (ids, weights) = b.read_routing(out, 1)?;
        Ok(ids.into_iter().map(|e| e as f32).chain(weights).collect())
    }));
    for dtype in DType::ALL {
        let shapes: &[(usize, usize, usize)] = if dtype.block_len() == 256 {
            &[(9, 96, 160)]
        } else {
            &[(1, 5, 3), (2, 96, 160), (9, 130, 257), (40, 64, 48)]
        };
        for &(rows, width, inner) in shapes {
            let [width, inner] = [width, inner].map(|n: usize| n.next_multiple_of(dtype.block_len()));
            let name = format!("mlp {dtype} {rows} rows [{inner}, {width}]");
            all.push(Case::new(name, 2e-5, move |b, r| mlp(b, r, dtype, rows, width, inner)));
            for shared in [false, true] {
                let name = format!("moe {dtype} {rows} rows [{inner}, {width}] shared {shared}");
                all.push(Case::new(name, 2e-5, move |b, r| {
                    moe(b, r, dtype, width, inner, shared, rows, Rows::Together)
                }));
            }
        }
    }
}

fn route(
    b: &mut dyn Backend,
    random: &mut Random,
    shape: RouterShape,
    bias: bool,
    rows: usize,
    width: usize,
) -> Result<Vec<f32>, Error> {
    let gate = b.load_matrix(random.matrix(DType::BF16, shape.experts, width)?)?;
    let bias = if bias { Some(b.load_vector(&random.normals(shape.experts))?) } else { None };
    let x = buffer_of(b, &random.normals(rows * width), width)?;
    let out = b.alloc_routing(rows, shape.top_k)?;
    b.begin_step(&plain_step(rows))?;
    b.route(&shape, x, gate, bias, out)?;
    let (ids, weights) = b.read_routing(out, rows)?;
    Ok(ids.into_iter().map(|e| e as f32).chain(weights).collect())
}

fn load_mlp(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    width: usize,
    inner: usize,
) -> Result<Mlp, Error> {
    Ok(Mlp {
        gate: b.load_matrix(random.matrix(dtype, inner, width)?)?,
        up: b.load_matrix(random.matrix(dtype, inner, width)?)?,
        down: b.load_matrix(random.matrix(dtype, width, inner)?)?,
    })
}

fn mlp(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    rows: usize,
    width: usize,
    inner: usize,
) -> Result<Vec<f32>, Error> {
    let mlp = load_mlp(b, random, dtype, width, inner)?;
    let x = buffer_of(b, &random.normals(rows * width), width)?;
    let out = buffer_of(b, &random.normals(rows * width), width)?;
    b.begin_step(&plain_step(rows))?;
    b.mlp(x, &mlp, out)?;
    read_rows(b, out, rows, width)
}

fn moe(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    width: usize,
    inner: usize,
    shared: bool,
    batch: usize,
    rows: Rows,
) -> Result<Vec<f32>, Error> {
    let gate = b.load_matrix(random.matrix(DType::F32, V3.experts, width)?)?;
    let mut experts = Vec::new();
    for _ in 0..V3.experts {
        experts.push(ExpertMatrices {
            gate: random.matrix(dtype, inner, width)?,
            up: random.matrix(dtype, inner, width)?,
            down: random.matrix(dtype, width, inner)?,
        });
    }
    let experts = b.load_experts(experts)?;
    let shared =
        if shared { Some(load_mlp(b, random, dtype, width, inner + dtype.block_len())?) } else { None };
    let (x, out) = (b.alloc(batch, width)?, b.alloc(batch, width)?);
    let routing = b.alloc_routing(batch, V3.top_k)?;
    let (values, residual) = (random.normals(batch * width), random.normals(batch * width));
    let step = if rows == Rows::Together { batch } else { 1 };
    let mut all = Vec::new();
    for (v, r) in values.chunks(step * width).zip(residual.chunks(step * width)) {
        b.write(v, x)?;
        b.write(r, out)?;
        b.begin_step(&plain_step(step))?;
        b.route(&V3, x, gate, None, routing)?;
        b.moe(x, routing, experts, shared.as_ref(), out)?;
        all.extend(read_rows(b, out, step, width)?);
    }
    Ok(all)
}

pub(super) fn invariance() -> Vec<Invariance> {
    let mut all: Vec<Invariance> = Vec::new();
    for dtype in DType::ALL {
        let [width, inner] = [130, 150].map(|n: usize| n.next_multiple_of(dtype.block_len()));
        all.push((
            format!("moe {dtype}"),
            Box::new(move |b, r, rows| moe(b, r, dtype, width, inner, true, 21, rows)),
        ));
    }
    all
}

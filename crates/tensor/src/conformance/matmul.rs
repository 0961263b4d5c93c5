//! `embed`, `matmul`, `matmul_add`, `gather_rows`, `concat`.

use super::{Case, Invariance, Random, Rows, buffer_of, plain_step, read_rows};
use crate::{Backend, DType, Error};

/// `[outputs, inputs]`: smaller than a vector, one off a vector, over FP8 block edges.
const SHAPES: [(usize, usize); 12] = [
    (1, 1),
    (3, 7),
    (5, 16),
    (16, 31),
    (17, 33),
    (31, 64),
    (64, 65),
    (40, 128),
    (129, 130),
    (128, 384),
    (300, 515),
    (67, 1029),
];
const ROWS: [usize; 8] = [1, 2, 3, 4, 5, 8, 17, 33];

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for dtype in DType::ALL {
        // Blocks are decoded before they are multiplied: what depends on the shape is the same for all of them.
        let step = if dtype.block_len() == 1 { 1 } else { 4 };
        for (i, (n, k)) in SHAPES.into_iter().enumerate().skip(step / 2).step_by(step) {
            let k = k.next_multiple_of(dtype.block_len());
            for rows in [ROWS[i % ROWS.len()], ROWS[(i + 3) % ROWS.len()]] {
                for add in [false, true] {
                    let op = if add { "matmul_add" } else { "matmul" };
                    let name = format!("{op} {dtype} {rows} rows [{n}, {k}]");
                    all.push(Case::new(name, 1e-5, move |b, r| matmul(b, r, dtype, n, k, rows, add)));
                }
            }
        }
        for (vocab, width) in [(1, 1), (7, 33), (300, 200usize)] {
            let width = width.next_multiple_of(dtype.block_len());
            let name = format!("embed {dtype} [{vocab}, {width}]");
            all.push(Case::new(name, 0.0, move |b, r| embed(b, r, dtype, vocab, width)));
        }
    }
    all.push(Case::new("gather_rows", 0.0, gather));
    all.push(Case::new("concat", 0.0, concat));
}

fn matmul(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    n: usize,
    k: usize,
    rows: usize,
    add: bool,
) -> Result<Vec<f32>, Error> {
    let w = b.load_matrix(random.matrix(dtype, n, k)?)?;
    let x = buffer_of(b, &random.normals(rows * k), k)?;
    let out = buffer_of(b, &random.normals(rows * n), n)?;
    b.begin_step(&plain_step(rows))?;
    if add {
        b.matmul_add(x, w, out, rows)?;
    } else {
        b.matmul(x, w, out, rows)?;
    }
    read_rows(b, out, rows, n)
}

fn embed(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    vocab: usize,
    width: usize,
) -> Result<Vec<f32>, Error> {
    let table = b.load_matrix(random.matrix(dtype, vocab, width)?)?;
    let mut step = plain_step(9);
    step.tokens = (0..9).map(|_| random.below(vocab) as u32).collect();
    let out = b.alloc(9, width)?;
    b.begin_step(&step)?;
    b.embed(table, out)?;
    read_rows(b, out, 9, width)
}

fn gather(b: &mut dyn Backend, random: &mut Random) -> Result<Vec<f32>, Error> {
    let x = buffer_of(b, &random.normals(11 * 19), 19)?;
    let out = b.alloc(5, 19)?;
    b.begin_step(&plain_step(11))?;
    b.gather_rows(x, &[10, 0, 3, 3], out)?;
    read_rows(b, out, 4, 19)
}

fn concat(b: &mut dyn Backend, random: &mut Random) -> Result<Vec<f32>, Error> {
    let left = buffer_of(b, &random.normals(6 * 13), 13)?;
    let right = buffer_of(b, &random.normals(6 * 29), 29)?;
    let out = b.alloc(6, 42)?;
    b.begin_step(&plain_step(5))?;
    b.concat(left, right, out)?;
    read_rows(b, out, 5, 42)
}

pub(super) fn invariance() -> Vec<Invariance> {
    let mut all: Vec<Invariance> = Vec::new();
    for dtype in DType::ALL {
        let shapes: &[(usize, usize)] =
            if dtype.block_len() == 1 { &[(17, 33), (129, 300), (256, 384)] } else { &[(129, 300)] };
        for &(n, k) in shapes {
            let k = k.next_multiple_of(dtype.block_len());
            all.push((
                format!("matmul {dtype} [{n}, {k}]"),
                Box::new(move |b, r, rows| alone_or_together(b, r, dtype, n, k, rows)),
            ));
        }
    }
    all
}

fn alone_or_together(
    b: &mut dyn Backend,
    random: &mut Random,
    dtype: DType,
    n: usize,
    k: usize,
    rows: Rows,
) -> Result<Vec<f32>, Error> {
    const BATCH: usize = 23;
    let w = b.load_matrix(random.matrix(dtype, n, k)?)?;
    let values = random.normals(BATCH * k);
    let x = b.alloc(BATCH, k)?;
    let out = b.alloc(BATCH, n)?;
    let mut all = Vec::new();
    let step = if rows == Rows::Together { BATCH } else { 1 };
    for chunk in values.chunks(step * k) {
        b.write(chunk, x)?;
        b.begin_step(&plain_step(step))?;
        b.matmul(x, w, out, step)?;
        all.extend(read_rows(b, out, step, n)?);
    }
    Ok(all)
}

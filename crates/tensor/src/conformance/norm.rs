//! `rms_norm`.

use super::{Case, buffer_of, plain_step, read_rows};

pub(super) fn add_cases(all: &mut Vec<Case>) {
    for (rows, width) in [(1, 1), (2, 7), (3, 16), (5, 40), (1, 96), (33, 129), (4, 1030)] {
        all.push(Case::new(format!("rms_norm {rows} rows of {width}"), 2e-6, move |b, random| {
            let weight = b.load_vector(&random.normals(width))?;
            let x = buffer_of(b, &random.normals(rows * width), width)?;
            let out = b.alloc(rows, width)?;
            b.begin_step(&plain_step(rows))?;
            b.rms_norm(x, weight, 1e-5, out, rows)?;
            read_rows(b, out, rows, width)
        }));
    }
}

//! `embed`, `matmul`, `matmul_add`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Weight},
    error::at_most,
};

use super::RowShares;
use crate::{
    CpuBackend,
    matrix::{Inputs, MatrixRef, Product},
    memory::Shared,
    packed::Rounding,
    simd::{Gemm, Output, WeightRef},
};

impl CpuBackend {
    pub(crate) fn embed_rows(&mut self, table: Weight, out: Buffer) -> Result<(), Error> {
        let op = "embed";
        let table = self.matrix(op, table)?.clone();
        self.sized(op, out, self.rows(), table.cols())?;
        for &token in &self.step.tokens {
            at_most(op, "token", table.rows() - 1, token as usize)?;
        }
        let (w, out) = (WeightRef::new(&table), &mut self.buffers[out.0 as usize].values);
        for (&token, row) in self.step.tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
            // SAFETY: the token is a row of the table and `row` holds one; the level was detected.
            unsafe { (self.kernels.decode_row)(&w, token as usize, row.as_mut_ptr()) };
        }
        Ok(())
    }

    pub(crate) fn project(
        &mut self,
        op: &'static str,
        x: Buffer,
        weight: Weight,
        out: Buffer,
        rows: usize,
        output: Output<'static>,
    ) -> Result<(), Error> {
        Self::apart(op, x, out)?;
        let w = self.factor(op, weight)?;
        self.sized(op, x, rows, w.cols)?;
        self.sized(op, out, rows, w.rows)?;
        self.profile.product(&w, rows);
        let inputs = self.inputs(x, rows, &[w])?;
        let mut y = std::mem::take(&mut self.buffers[out.0 as usize].values);
        let result = self.multiply(w, inputs, rows, &mut y, output);
        self.buffers[out.0 as usize].values = y;
        result
    }

    /// Rows `0..rows` of a buffer in every form that `weights` ask for.
    fn inputs(&mut self, x: Buffer, rows: usize, weights: &[MatrixRef]) -> Result<Inputs, Error> {
        let mut rounded = [None; 2];
        for rounding in self.round_inputs(x, rows, weights)? {
            let most = self.kernels.tile_tokens(rounding);
            let tiled = self.rounded[rounding as usize].tiled(&mut self.pool, rows, most)?;
            rounded[rounding as usize] = Some(tiled);
        }
        let x = &self.buffers[x.0 as usize];
        Ok(Inputs { exact: x.values.as_ptr(), stride: x.cols, rounded })
    }

    /// Rounds rows `0..rows` of a buffer as `weights` ask for, unless they were already; says which roundings they ask.
    pub(crate) fn round_inputs(
        &mut self,
        x: Buffer,
        rows: usize,
        weights: &[MatrixRef],
    ) -> Result<impl Iterator<Item = Rounding> + use<>, Error> {
        let asked = [Rounding::Bf16, Rounding::Bytes]
            .map(|r| weights.iter().any(|w| w.rounding() == Some(r)).then_some(r));
        let a = &self.buffers[x.0 as usize];
        for rounding in asked.into_iter().flatten() {
            let last = &mut self.rounded[rounding as usize];
            let of = Some((x.0, a.version, rows));
            if last.of != of {
                last.of = None;
                last.round(self.kernels, &mut self.pool, rounding, &a.values[..rows * a.cols], a.cols)?;
                last.of = of;
            }
        }
        Ok(asked.into_iter().flatten())
    }

    /// All rows of `w` times rows `0..rows` of `x` into `y`, as wide as `w` has rows.
    fn multiply(
        &mut self,
        w: MatrixRef,
        x: Inputs,
        rows: usize,
        y: &mut [f32],
        output: Output<'static>,
    ) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        self.count_to(rows);
        let (n, tokens) = (w.rows, &self.identity[..rows]);
        let shares = RowShares::new(n, rows * n * w.cols, self.pool.threads());
        let (kernels, scratch) = (self.kernels, &self.scratch);
        let y = Shared::new(y);
        self.pool.run(shares.tasks(), &|task, thread| {
            let rows_of_w = shares.of(task);
            // SAFETY: the pool gave this thread its number.
            let panel = unsafe { &mut scratch.of(thread).panel };
            let product = Product {
                rows: rows_of_w.clone(),
                x,
                tokens,
                out: y.at(rows_of_w.start),
                out_stride: n,
                out_rows: tokens,
                output,
                then: w.place(rows_of_w.end.min(n - 1)),
            };
            // SAFETY: the caller proved the sizes of x and y; tasks write disjoint columns; x is not y.
            unsafe { w.multiply(kernels, &product, panel) };
        })
    }

    /// All `n` rows of `w` times rows `0..rows` of `x` (`w.cols` wide) into `y` (`n` wide), exactly.
    pub(crate) fn gemm(
        &mut self,
        w: &WeightRef,
        n: usize,
        x: *const f32,
        rows: usize,
        y: &mut [f32],
        output: Output<'static>,
    ) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        self.count_to(rows);
        let tokens = &self.identity[..rows];
        let shares = RowShares::new(n, rows * n * w.cols, self.pool.threads());
        let (kernels, scratch, panel_len) = (self.kernels, &self.scratch, self.panel_len);
        let (x, y) = (Input(x), Shared::new(y));
        self.pool.run(shares.tasks(), &|task, thread| {
            let rows_of_w = shares.of(task);
            // SAFETY: the pool gave this thread its number.
            let panel = unsafe { &mut scratch.of(thread).panel };
            let g = Gemm {
                w: *w,
                rows: rows_of_w.clone(),
                x: x.get(),
                x_stride: w.cols,
                tokens,
                out: y.at(rows_of_w.start),
                out_stride: n,
                out_rows: tokens,
                output,
                panel: panel.as_mut_ptr(),
                panel_len,
            };
            // SAFETY: the callers proved the sizes of x and y; tasks write disjoint columns; x is not y.
            unsafe { (kernels.gemm)(&g) };
        })
    }
}

/// A place that all tasks read.
#[derive(Clone, Copy)]
pub(crate) struct Input(pub(crate) *const f32);

// SAFETY: it is only read while a fork runs.
unsafe impl Send for Input {}
// SAFETY: as above.
unsafe impl Sync for Input {}

impl Input {
    pub(crate) fn get(self) -> *const f32 {
        self.0
    }
}

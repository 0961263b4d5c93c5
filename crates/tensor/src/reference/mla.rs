//! Multi-head latent attention over the paged latent cache (DeepSeek-V2 paper, section 2.1; absorbed form:
//! appendix of the same).

use super::{Matrix, ReferenceBackend, matmul::dot, norm::rms, rope::rotate};
use crate::{
    Error,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, Cache, KvB, MlaShape, Rope, Segment, Vector, Weight},
    error::expect,
};

impl ReferenceBackend {
    pub(super) fn append_latent(
        &mut self,
        shape: &MlaShape,
        rope: Rope,
        weight: Vector,
        eps: f32,
        kv: Buffer,
        cache: Cache,
        layer: usize,
    ) -> Result<(), Error> {
        let op = "mla_append";
        let table = self.rope(op, rope, shape.rope / 2)?;
        let w = self.vector(op, weight)?;
        expect(op, "latent norm", shape.latent, w.len())?;
        let kv = self.sized(op, kv, self.rows(), shape.latent + shape.rope)?;
        let c = self.cache(op, cache, layer)?;
        expect(op, "cache latent", shape.latent, c.shape.latent)?;
        expect(op, "cache rope", shape.rope, c.shape.rope)?;
        self.check_blocks(op, c.shape.blocks)?;
        let mut written = Vec::new();
        for (r, (segment, position)) in self.positions().into_iter().enumerate() {
            let mut row = rms(&kv.row(r)[..shape.latent], w, eps);
            row.extend_from_slice(&kv.row(r)[shape.latent..]);
            rotate(table, position, &mut row[shape.latent..]);
            let block = self.block_of(&segment, position);
            written.push((c.offset(layer, block, position % BLOCK_TOKENS), c.rounded(&row)?));
        }
        for (at, row) in written {
            self.caches[cache.0 as usize].values[at..at + row.len()].copy_from_slice(&row);
        }
        Ok(())
    }

    pub(super) fn attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvB,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "mla_attend";
        let kv_b = self.matrix(op, Weight(kv_b.0))?;
        expect(op, "kv_b rows", shape.heads * (shape.nope + shape.value), kv_b.rows)?;
        expect(op, "kv_b columns", shape.latent, kv_b.cols)?;
        let width = shape.nope + shape.rope;
        let q = self.sized(op, q, self.rows(), shape.heads * width)?;
        self.sized(op, out, self.rows(), shape.heads * shape.value)?;
        let c = self.cache(op, cache, layer)?;
        expect(op, "cache latent", shape.latent, c.shape.latent)?;
        expect(op, "cache rope", shape.rope, c.shape.rope)?;
        self.check_blocks(op, c.shape.blocks)?;
        let mut rows = Vec::new();
        for (r, (segment, position)) in self.positions().into_iter().enumerate() {
            let cached = self.cached_rows(cache, layer, &segment, position + 1);
            let mut row = Vec::with_capacity(shape.heads * shape.value);
            for h in 0..shape.heads {
                let q = &q.row(r)[h * width..][..width];
                let head = Head { shape, kv_b, first: h * (shape.nope + shape.value) };
                row.extend(match segment.mode {
                    AttendMode::Absorbed => head.absorbed(q, &cached),
                    AttendMode::Expanded => head.expanded(q, &cached),
                });
            }
            rows.push(row);
        }
        for (r, row) in rows.iter().enumerate() {
            self.buffers[out.0 as usize].row_mut(r).copy_from_slice(row);
        }
        Ok(())
    }

    /// Cache rows `[c || r]` of positions `0..len` of a sequence.
    fn cached_rows(&self, cache: Cache, layer: usize, segment: &Segment, len: usize) -> Vec<&[f32]> {
        let c = &self.caches[cache.0 as usize];
        let row = |p: usize| {
            let at = c.offset(layer, self.block_of(segment, p), p % BLOCK_TOKENS);
            &c.values[at..at + c.width()]
        };
        (0..len).map(row).collect()
    }
}

struct Head<'a> {
    shape: &'a MlaShape,
    kv_b: &'a Matrix,
    /// First of this head's rows in `kv_b`.
    first: usize,
}

impl Head<'_> {
    fn w_uk(&self, d: usize) -> &[f32] {
        self.kv_b.row(self.first + d)
    }
    fn w_uv(&self, d: usize) -> &[f32] {
        self.kv_b.row(self.first + self.shape.nope + d)
    }

    /// `score = q_nope . (W_UK c) + q_pe . r`; `o = sum_s p_s (W_UV c_s)`
    fn expanded(&self, q: &[f32], cached: &[&[f32]]) -> Vec<f32> {
        let (q_nope, q_pe) = q.split_at(self.shape.nope);
        let score = |row: &&[f32]| {
            let (c, r) = row.split_at(self.shape.latent);
            let nope: f64 = (0..self.shape.nope).map(|d| f64::from(q_nope[d]) * dot(self.w_uk(d), c)).sum();
            nope + dot(q_pe, r)
        };
        let p = self.softmax(&cached.iter().map(score).collect::<Vec<_>>());
        let value = |d| {
            cached
                .iter()
                .zip(&p)
                .map(|(row, p)| p * dot(self.w_uv(d), &row[..self.shape.latent]))
                .sum::<f64>()
        };
        (0..self.shape.value).map(|d| value(d) as f32).collect()
    }

    /// `q~ = W_UK^T q_nope`; `score = q~ . c + q_pe . r`; `o = W_UV (sum_s p_s c_s)`
    fn absorbed(&self, q: &[f32], cached: &[&[f32]]) -> Vec<f32> {
        let (q_nope, q_pe) = q.split_at(self.shape.nope);
        let latent = self.shape.latent;
        let absorb =
            |c: usize| (0..self.shape.nope).map(|d| f64::from(q_nope[d]) * f64::from(self.w_uk(d)[c])).sum();
        let q_latent: Vec<f64> = (0..latent).map(absorb).collect();
        let score = |row: &&[f32]| {
            let (c, r) = row.split_at(latent);
            q_latent.iter().zip(c).map(|(q, &c)| q * f64::from(c)).sum::<f64>() + dot(q_pe, r)
        };
        let p = self.softmax(&cached.iter().map(score).collect::<Vec<_>>());
        let mean = |i: usize| cached.iter().zip(&p).map(|(row, p)| p * f64::from(row[i])).sum();
        let mean: Vec<f64> = (0..latent).map(mean).collect();
        let value = |d| self.w_uv(d).iter().zip(&mean).map(|(&w, m)| f64::from(w) * m).sum::<f64>();
        (0..self.shape.value).map(|d| value(d) as f32).collect()
    }

    fn softmax(&self, scores: &[f64]) -> Vec<f64> {
        let scale = f64::from(self.shape.softmax_scale);
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s * scale));
        let e: Vec<f64> = scores.iter().map(|s| (s * scale - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| e / sum).collect()
    }
}

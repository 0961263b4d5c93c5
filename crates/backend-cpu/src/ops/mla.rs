//! `mla_append`, `mla_attend`: attention over the paged latent cache.
//!
//! Both forms walk the cache in blocks of 64 positions from the first one on with a running softmax, whatever the
//! batch, so a row's result depends on its own sequence alone.

use oxseek_tensor::{
    Error,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, Cache, KvB, MlaShape, Rope, Segment, Vector},
    error::{expect, shape_error},
};

mod exact;
mod expanded;
mod native;

pub(crate) use native::NativeScratch;

use super::{matmul::Input, rope::rotate};
use crate::{CpuBackend, cache::LatentRows, kv_b::Factor, memory::Shared, packed::Rounding, simd::WeightRef};

/// Most heads of one row that a task attends with: they share each cache row that it reads.
const HEADS_PER_TASK_MAX: usize = 8;

/// What one task attends.
#[derive(Clone, Copy)]
pub(crate) enum Task {
    /// One row, heads `from..to`.
    Absorbed { segment: Segment, row: usize, from: usize, to: usize },
    /// All rows of a segment, one head.
    Expanded { segment: Segment, head: usize },
}

impl CpuBackend {
    pub(crate) fn append_latent(
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
        let width = shape.latent + shape.rope;
        self.sized(op, kv, self.rows(), width)?;
        self.vector(op, weight, shape.latent)?;
        self.cache(op, cache, layer, shape)?;
        self.prepare_rope(op, rope, shape.rope)?;
        let (w, kv) = (&self.vectors[weight.0 as usize], &self.buffers[kv.0 as usize].values);
        let table = &self.ropes[rope.0 as usize].rows;
        let cache = &mut self.caches[cache.0 as usize];
        let (format, mut row) = (cache.shape.format, vec![0.0; width]);
        // One thread: a row is short, and two rows of a broken batch may name the same slot.
        for s in &self.step.segments {
            for r in s.row..s.row + s.rows {
                let position = s.start + r - s.row;
                let block = self.step.blocks[s.first_block + position / BLOCK_TOKENS];
                let (from, latent) = (&kv[r * width..][..width], shape.latent);
                // SAFETY: all three slices hold `latent` values.
                unsafe { (self.kernels.rms_norm)(from.as_ptr(), w.as_ptr(), eps, row.as_mut_ptr(), latent) };
                row[latent..].copy_from_slice(&from[latent..]);
                rotate(&mut row[latent..], &table[r * shape.rope..][..shape.rope]);
                format.encode_row(&row, latent, cache.row_mut(layer, block, position % BLOCK_TOKENS));
            }
        }
        Ok(())
    }

    pub(crate) fn attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvB,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "mla_attend";
        Self::apart(op, q, out)?;
        let n = self.kv_bs.len();
        let missing = shape_error(op, "kv_b handle", n, kv_b.0 as usize);
        let w = self.kv_bs.get(kv_b.0 as usize).ok_or(missing)?;
        expect(op, "heads of kv_b", shape.heads, w.shape.heads)?;
        expect(op, "nope of kv_b", shape.nope, w.shape.nope)?;
        expect(op, "value of kv_b", shape.value, w.shape.value)?;
        expect(op, "latent of kv_b", shape.latent, w.shape.latent)?;
        self.sized(op, q, self.rows(), shape.heads * (shape.nope + shape.rope))?;
        self.sized(op, out, self.rows(), shape.heads * shape.value)?;
        let cache = self.cache(op, cache, layer, shape)?.layer(layer);
        let rows: usize = self.step.segments.iter().map(|s| s.start + s.rows).sum();
        self.profile.bytes += (rows * cache.row_bytes) as u64;
        match &self.kv_bs[kv_b.0 as usize].factor {
            Factor::Stored(w) => {
                self.profile.bytes += w.total_bytes() as u64;
                self.profile.attend(shape, &self.step.segments, None);
                self.attend_exactly(shape, q, WeightRef::new(w), cache, out)
            }
            Factor::Packed(w) => {
                self.profile.bytes += w.absorbed_bytes() as u64;
                self.profile.attend(shape, &self.step.segments, Some(Rounding::Bf16));
                self.attend_natively(shape, q, w.panels(), cache, out)
            }
        }
    }

    fn attend_exactly(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: WeightRef,
        cache: LatentRows,
        out: Buffer,
    ) -> Result<(), Error> {
        self.count_to(self.rows().max(shape.heads));
        let tasks = self.attention_tasks(shape);
        let attention = exact::Attention {
            shape: *shape,
            kernels: self.kernels,
            kv_b,
            cache,
            blocks: &self.step.blocks,
            identity: &self.identity,
            q: Input(self.buffers[q.0 as usize].values.as_ptr()),
            out: Shared::new(&mut self.buffers[out.0 as usize].values),
            panel_len: self.panel_len,
        };
        let scratch = &self.scratch;
        let result = self.pool.run(tasks.len(), &|task, thread| {
            // SAFETY: the pool gave this thread its number.
            let scratch = unsafe { scratch.of(thread) };
            match tasks[task] {
                Task::Absorbed { segment, row, from, to } => {
                    attention.absorbed(scratch, &segment, row, from, to);
                }
                Task::Expanded { segment, head } => attention.expanded(scratch, &segment, head),
            }
        });
        self.attention_tasks = tasks;
        result
    }

    fn attention_tasks(&mut self, shape: &MlaShape) -> Vec<Task> {
        let mut tasks = std::mem::take(&mut self.attention_tasks);
        tasks.clear();
        let group = shape.heads.div_ceil(self.pool.threads()).min(HEADS_PER_TASK_MAX);
        for &segment in &self.step.segments {
            match segment.mode {
                AttendMode::Expanded => {
                    tasks.extend((0..shape.heads).map(|head| Task::Expanded { segment, head }));
                }
                AttendMode::Absorbed => {
                    for row in 0..segment.rows {
                        tasks.extend((0..shape.heads).step_by(group).map(|from| {
                            let to = shape.heads.min(from + group);
                            Task::Absorbed { segment, row, from, to }
                        }));
                    }
                }
            }
        }
        tasks
    }
}

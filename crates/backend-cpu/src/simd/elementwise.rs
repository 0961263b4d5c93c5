//! Norms, softmax, SwiGLU and weighted sums of rows.

use super::Simd;

/// `o = o * keep + sum_j p[j] * v[j]` over `n` rows of `v`.
///
/// # Safety (of the kernel)
/// `p` has `n` values, `v` has `n` rows of `width` values, `stride` apart, `o` has `width` values.
pub(crate) struct WeightedRows {
    pub(crate) p: *const f32,
    pub(crate) n: usize,
    pub(crate) v: *const f32,
    pub(crate) stride: usize,
    pub(crate) o: *mut f32,
    pub(crate) width: usize,
    pub(crate) keep: f32,
}

/// `y += a * x`
///
/// # Safety
/// `n` values at `x` and `y`, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn axpy<S: Simd>(a: f32, x: *const f32, y: *mut f32, n: usize) {
    // SAFETY: all accesses are below `n`.
    unsafe {
        let av = S::splat(a);
        let mut i = 0;
        while i + S::LANES <= n {
            av.fma(S::load(x.add(i)), S::load(y.add(i))).store(y.add(i));
            i += S::LANES;
        }
        if i < n {
            av.fma(load_tail::<S>(x.add(i), n - i), load_tail::<S>(y.add(i), n - i))
                .store_tail(y.add(i), n - i);
        }
    }
}

/// # Safety
/// As [`WeightedRows`] says, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn weighted_rows<S: Simd>(w: &WeightedRows) {
    // SAFETY: all accesses are below `width` in row `j < n`.
    unsafe {
        let keep = S::splat(w.keep);
        let mut i = 0;
        // Eight chains hide the latency of the multiply-adds.
        while i + 8 * S::LANES <= w.width {
            weighted_chunk::<S, 8>(w, i, keep);
            i += 8 * S::LANES;
        }
        while i + S::LANES <= w.width {
            weighted_chunk::<S, 1>(w, i, keep);
            i += S::LANES;
        }
        if i < w.width {
            let n = w.width - i;
            let mut acc = load_tail::<S>(w.o.add(i), n).mul(keep);
            for j in 0..w.n {
                acc = S::splat(*w.p.add(j)).fma(load_tail::<S>(w.v.add(j * w.stride + i), n), acc);
            }
            acc.store_tail(w.o.add(i), n);
        }
    }
}

#[inline(always)]
unsafe fn weighted_chunk<S: Simd, const C: usize>(w: &WeightedRows, i: usize, keep: S) {
    // SAFETY: the caller keeps `i + C * LANES` within `width`.
    unsafe {
        let mut acc: [S; C] = std::array::from_fn(|c| S::load(w.o.add(i + c * S::LANES)).mul(keep));
        for j in 0..w.n {
            let p = S::splat(*w.p.add(j));
            let v = w.v.add(j * w.stride + i);
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = p.fma(S::load(v.add(c * S::LANES)), *acc);
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            acc.store(w.o.add(i + c * S::LANES));
        }
    }
}

/// One step of a running softmax: scales the first `n` of 64 scores, turns them into `exp(s - m)` where `m` is the new
/// maximum, and sets the rest to 0. Gives `m` and the sum.
///
/// # Safety
/// 64 values at `s`, `1 <= n <= 64`, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn softmax_block<S: Simd>(s: *mut f32, n: usize, scale: f32, max: f32) -> (f32, f32) {
    // SAFETY: all accesses are below 64, a multiple of every LANES.
    unsafe {
        for i in n..64 {
            *s.add(i) = f32::NEG_INFINITY;
        }
        let scale = S::splat(scale);
        let mut m = S::splat(max);
        let mut i = 0;
        while i < 64 {
            let v = S::load(s.add(i)).mul(scale);
            v.store(s.add(i));
            m = m.max(v);
            i += S::LANES;
        }
        let max = m.max_lane();
        let minus = S::splat(-max);
        let zero = S::splat(0.0);
        let mut sum = zero;
        i = 0;
        while i < 64 {
            let p = exp::<S>(S::load(s.add(i)).add(minus));
            p.store(s.add(i));
            i += S::LANES;
        }
        for i in n..64 {
            *s.add(i) = 0.0;
        }
        i = 0;
        while i < 64 {
            sum = sum.add(S::load(s.add(i)));
            i += S::LANES;
        }
        (max, S::sum4([sum, zero, zero, zero])[0])
    }
}

/// `out = silu(g) * u`
///
/// # Safety
/// `n` values at each pointer, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn silu_mul<S: Simd>(g: *const f32, u: *const f32, out: *mut f32, n: usize) {
    // SAFETY: all accesses are below `n`.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            silu::<S>(S::load(g.add(i))).mul(S::load(u.add(i))).store(out.add(i));
            i += S::LANES;
        }
        if i < n {
            let v = silu::<S>(load_tail::<S>(g.add(i), n - i)).mul(load_tail::<S>(u.add(i), n - i));
            v.store_tail(out.add(i), n - i);
        }
    }
}

/// `z / (1 + exp(-z))`
#[inline(always)]
unsafe fn silu<S: Simd>(z: S) -> S {
    // SAFETY: arithmetic only.
    unsafe { z.div(exp::<S>(z.mul(S::splat(-1.0))).add(S::splat(1.0))) }
}

/// `out = w * x / sqrt(mean(x^2) + eps)`
///
/// # Safety
/// `n >= 1` values at each pointer, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd>(x: *const f32, w: *const f32, eps: f32, out: *mut f32, n: usize) {
    // SAFETY: all accesses are below `n`.
    unsafe {
        let zero = S::splat(0.0);
        let mut sum = [zero; 4];
        let mut i = 0;
        let mut lane = 0;
        while i + S::LANES <= n {
            let v = S::load(x.add(i));
            sum[lane % 4] = v.fma(v, sum[lane % 4]);
            lane += 1;
            i += S::LANES;
        }
        if i < n {
            let v = load_tail::<S>(x.add(i), n - i);
            sum[lane % 4] = v.fma(v, sum[lane % 4]);
        }
        let total: f32 = S::sum4(sum).iter().sum();
        let scale = S::splat(1.0 / (total / n as f32 + eps).sqrt());
        i = 0;
        while i + S::LANES <= n {
            S::load(w.add(i)).mul(S::load(x.add(i)).mul(scale)).store(out.add(i));
            i += S::LANES;
        }
        if i < n {
            let v = load_tail::<S>(w.add(i), n - i).mul(load_tail::<S>(x.add(i), n - i).mul(scale));
            v.store_tail(out.add(i), n - i);
        }
    }
}

/// `e^x` to about one unit in the last place; 0 below -87.
///
/// `x = n ln 2 + r`, |r| <= ln 2 / 2; `e^r` by its Taylor polynomial of degree 7, whose remainder is under 1e-8 there.
#[inline(always)]
unsafe fn exp<S: Simd>(x: S) -> S {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    // SAFETY: arithmetic only.
    unsafe {
        // 2^-126 is the smallest normal; below it the result is as good as 0, and 88.37 keeps 2^n finite.
        let x = x.max(S::splat(-87.33)).min(S::splat(88.37));
        let shifted = x.fma(S::splat(std::f32::consts::LOG2_E), S::splat(SHIFT));
        let n = shifted.add(S::splat(-SHIFT));
        // ln 2 in two parts, so that n ln 2 is exact enough.
        let r = n.fma(S::splat(-0.693_359_4), x);
        let r = n.fma(S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.fma(r, S::splat(c));
        }
        p.mul(shifted.pow2_of_shifted())
    }
}

/// `2^x` for `x` of at most 0 to about 4e-6: what it makes is rounded to BF16. 0 below -126.
///
/// `x = n + r`, |r| <= 1/2; `2^r` by the polynomial of degree 4 that meets it at the five Chebyshev points.
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: S) -> S {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    const C: [f32; 5] = [0.009_666_368, 0.055_921_976, 0.240_223_5, 0.693_121, 1.0];
    // SAFETY: arithmetic only.
    unsafe {
        let x = x.max(S::splat(-127.0));
        let shifted = x.add(S::splat(SHIFT));
        // SHIFT - shifted is exact: minus n.
        let r = x.add(shifted.fma(S::splat(-1.0), S::splat(SHIFT)));
        let mut p = S::splat(C[0]);
        for c in [C[1], C[2], C[3], C[4]] {
            p = p.fma(r, S::splat(c));
        }
        // At -127 the exponent field is zero: so is the power.
        p.mul(shifted.pow2_of_shifted())
    }
}

/// The first `n < LANES` values, the other lanes zero.
#[inline(always)]
unsafe fn load_tail<S: Simd>(p: *const f32, n: usize) -> S {
    let mut padded = [0.0f32; 16];
    // SAFETY: the caller has `n` values at `p`; 16 values hold any vector.
    unsafe {
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n);
        S::load(padded.as_ptr())
    }
}

trait StoreTail {
    /// Stores the first `n < LANES` lanes.
    unsafe fn store_tail(self, p: *mut f32, n: usize);
}

impl<S: Simd> StoreTail for S {
    #[inline(always)]
    unsafe fn store_tail(self, p: *mut f32, n: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller has room for `n` values at `p`; 16 values hold any vector.
        unsafe {
            self.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

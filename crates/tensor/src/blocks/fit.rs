//! The search for scales: the smallest squared error of a few candidates, each refined by least squares.
//!
//! Sums run in eight lanes of fixed order, so that a compiler may use vectors and the result is the same everywhere.

const LANES: usize = 8;
/// Adding it rounds to a whole number, nearest even, without a call.
const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23

/// The nearest whole number of `low..=high`, which are below 2^22; NaN becomes `low`.
pub(super) fn round_within(v: f32, low: f32, high: f32) -> f32 {
    // These two comparisons are one instruction each.
    let v = if v > low { v } else { low };
    let v = if v < high { v } else { high };
    v + SHIFT - SHIFT
}

/// `K` sums over `x`, a whole number of eights.
fn sums<const K: usize>(x: &[f32], terms: impl Fn(f32) -> [f32; K]) -> [f32; K] {
    let mut lanes = [[0.0f32; LANES]; K];
    for eight in x.as_chunks::<LANES>().0 {
        for (i, &v) in eight.iter().enumerate() {
            for (lanes, term) in lanes.iter_mut().zip(terms(v)) {
                lanes[i] += term;
            }
        }
    }
    lanes.map(|l| ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7])))
}

/// The value of the largest magnitude, with its sign.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m: f32, &v| if v.abs() > m.abs() { v } else { m })
}

/// The scale with which the values `nearest` gives come closest to `x`; candidates put the extreme of `x` on each of
/// `places`.
pub(super) fn scale(x: &[f32], places: impl Iterator<Item = f32>, nearest: impl Fn(f32) -> f32) -> f32 {
    let extreme = extreme(x);
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut best, mut gain) = (0.0, 0.0);
    for place in places {
        let inverse = place / extreme;
        let [xq, qq] = sums(x, |v| {
            let q = nearest(v * inverse);
            [v * q, q * q]
        });
        // The least-squares scale is xq / qq; it leaves an error of xx - xq^2 / qq.
        if qq > 0.0 && xq * xq > gain * qq {
            (best, gain) = (xq / qq, xq * xq / qq);
        }
    }
    // Sums that overflowed or vanished leave the plain choice.
    if best == 0.0 || !best.is_finite() { extreme / nearest(f32::NEG_INFINITY) } else { best }
}

/// The squared error of `x` in steps of `step`.
pub(super) fn error(x: &[f32], step: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let inverse = inverse(step);
    let [e] = sums(x, |v| {
        let e = step * nearest(v * inverse) - v;
        [e * e]
    });
    e
}

/// `1 / step`, or 0 where that is no number.
pub(super) fn inverse(step: f32) -> f32 {
    let inverse = 1.0 / step;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// `x = scale * q - min` for whole `q` in `0..=high`; the scale is never negative.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub(super) scale: f32,
    pub(super) min: f32,
}

impl Line {
    /// The line with the smallest error of a few; with `below_zero`, `min` is not negative, so that zero is near.
    pub(super) fn best(x: &[f32], high: f32, below_zero: bool) -> Self {
        let start = if below_zero { 0.0 } else { x.first().copied().unwrap_or(0.0) };
        let (low, top) = x.iter().fold((start, start), |(low, top), &v| (v.min(low), v.max(top)));
        let span = top - low;
        let mut best = Self { scale: span / high, min: -low };
        if !(best.scale > 0.0 && span.is_finite()) {
            return Self { scale: 0.0, min: if low.is_finite() { -low } else { 0.0 } };
        }
        let mut least = best.error(x, high);
        // Trial scales around the one that spans the range; each is refined by least squares for its own codes.
        for i in -3i8..=6 {
            let trial = Self { scale: span / (high + 0.2 * f32::from(i)), min: -low };
            let trial = trial.refined(x, high, below_zero);
            let error = trial.error(x, high);
            if error < least {
                (best, least) = (trial, error);
            }
        }
        best
    }

    /// The code of `v`.
    pub(super) fn code(self, v: f32, high: f32) -> f32 {
        round_within((v + self.min) * inverse(self.scale), 0.0, high)
    }

    /// The least-squares line through (code, value).
    fn refined(self, x: &[f32], high: f32, below_zero: bool) -> Self {
        let (n, inverse) = (x.len() as f32, inverse(self.scale));
        let [q1, q2, v1, qv] = sums(x, |v| {
            let q = round_within((v + self.min) * inverse, 0.0, high);
            [q, q * q, v, q * v]
        });
        let det = n * q2 - q1 * q1;
        if det <= 0.0 {
            return self;
        }
        let scale = (n * qv - q1 * v1) / det;
        let min = (scale * q1 - v1) / n;
        if below_zero && min < 0.0 {
            let through_zero = qv / q2;
            return if through_zero > 0.0 { Self { scale: through_zero, min: 0.0 } } else { self };
        }
        if scale > 0.0 { Self { scale, min } } else { self }
    }

    /// The squared error of `x`.
    pub(super) fn error(self, x: &[f32], high: f32) -> f32 {
        let inverse = inverse(self.scale);
        let [e] = sums(x, |v| {
            let q = round_within((v + self.min) * inverse, 0.0, high);
            let e = self.scale * q - self.min - v;
            [e * e]
        });
        e
    }
}

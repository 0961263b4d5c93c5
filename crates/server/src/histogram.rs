//! Prometheus histograms that any thread may add to without a lock.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Counts of values by size.
pub(crate) struct Histogram {
    /// Upper bounds, rising.
    bounds: &'static [f64],
    /// Values in each bucket; one more than there are bounds.
    counts: Vec<AtomicU64>,
    /// Sum of the values in millionths, so that it can be added to atomically.
    sum_millionths: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_millionths: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_millionths.fetch_add((value * 1e6).round() as u64, Relaxed);
    }

    /// The text format; `labels` without braces.
    pub(crate) fn render(&self, name: &str, labels: &str, out: &mut String) {
        let mut total = 0;
        let bounds = self.bounds.iter().map(|&b| bound_text(b)).chain(["+Inf".into()]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Relaxed);
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}");
        }
        let sum = self.sum_millionths.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {total}");
    }
}

/// As Prometheus' Python client writes it: always with a point.
fn bound_text(bound: f64) -> String {
    if bound.fract() == 0.0 { format!("{bound:.1}") } else { bound.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_is_not_above_their_bound() {
        let histogram = Histogram::new(&[0.5, 1.0, 10.0]);
        [0.5, 0.6, 1.0, 3.25, 100.0].into_iter().for_each(|x| histogram.add(x));
        let mut text = String::new();
        histogram.render("h", "m=\"x\"", &mut text);
        let expected = "h_bucket{m=\"x\",le=\"0.5\"} 1\nh_bucket{m=\"x\",le=\"1.0\"} 3\n\
                        h_bucket{m=\"x\",le=\"10.0\"} 4\nh_bucket{m=\"x\",le=\"+Inf\"} 5\n\
                        h_sum{m=\"x\"} 105.35\nh_count{m=\"x\"} 5\n";
        assert_eq!(text, expected);
    }
}

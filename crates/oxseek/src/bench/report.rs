//! What was measured, for people (a table), for programs (JSON) or for spreadsheets (CSV).

use std::{io::Write, time::Duration};

use oxseek_backend_cpu::{CpuBackend, Limits};
use oxseek_model::Footprint;
use oxseek_tensor::Backend;
use serde_json::{Value, json};

use super::{
    cold::Cold,
    test::{Cost, Measured},
};
use crate::{args::BenchFormat, failure::Failure, inspect::size};

/// What the model runs on.
pub struct Machine {
    device: String,
    threads: usize,
}

impl Machine {
    pub fn of(backend: &CpuBackend) -> Self {
        Self { device: backend.info().device, threads: backend.threads() }
    }
}

/// The way to the first token.
pub struct Start {
    /// From the start of the process until the model could run.
    pub load: Duration,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// From the prompt to its logits, weights as the file has them.
    pub first_token: Duration,
    /// From the start of the process to the first token.
    pub first_token_at: Duration,
    /// What was left of packing the weights then.
    pub packing: Duration,
    /// What the disk can do, if the model came from there.
    pub cold: Option<Cold>,
}

/// Prints what comes in, as it comes where the format allows.
pub struct Report {
    format: BenchFormat,
    profile: bool,
    /// What JSON is made of at the end.
    head: Value,
    tests: Vec<Measured>,
}

const HEAD: [&str; 11] = [
    "test",
    "batch",
    "depth",
    "tokens/s",
    "slowest-fastest",
    "GB/s",
    "% of read",
    "read limit",
    "GOP/s",
    "% of mult.",
    "mult. limit",
];
const WIDTHS: [usize; 11] = [7, 5, 6, 8, 15, 6, 9, 11, 6, 10, 11];
const OPS_HEAD: [&str; 9] =
    ["op", "calls", "ms", "% of time", "MB", "GB/s", "% of read", "GOP/s", "% of mult."];
const OPS_WIDTHS: [usize; 9] = [12, 6, 9, 9, 9, 6, 9, 6, 10];
const CSV_HEAD: &str = "test,batch,depth,op,calls,seconds,tokens_per_second,slowest,fastest,bytes,bytes_per_second,\
                        read_limit_before,read_limit_after,read_part,operations,operations_per_second,\
                        multiply_limit_before,multiply_limit_after,multiply_part";

impl Report {
    pub fn new(format: BenchFormat, profile: bool) -> Self {
        Self { format, profile, head: Value::Null, tests: Vec::new() }
    }

    /// The limits alone.
    pub fn limits(&mut self, machine: &Machine, limits: &Limits) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match self.format {
            BenchFormat::Table => {
                writeln!(out, "device     {}", machine.device)?;
                write_limits(&mut out, machine, limits)?;
            }
            BenchFormat::Json => writeln!(out, "{:#}", limits_json(limits))?,
            BenchFormat::Csv => {
                let [f32s, bf16s, bytes] = limits.multiply;
                writeln!(out, "read,multiply_f32,multiply_bf16,multiply_bytes")?;
                writeln!(out, "{},{f32s},{bf16s},{bytes}", limits.read)?;
            }
        }
        Ok(())
    }

    /// What comes before the first test.
    pub fn begin(
        &mut self,
        name: &str,
        machine: &Machine,
        f: &Footprint,
        start: &Start,
        limits: &Limits,
    ) -> Result<(), Failure> {
        self.head = json!({
            "model": name,
            "active_bytes": f.bytes_per_token,
            "device": machine.device,
            "threads": machine.threads,
            "start": {
                "load_seconds": start.load.as_secs_f64(),
                "prompt_tokens": start.prompt,
                "first_token_seconds": start.first_token.as_secs_f64(),
                "process_to_first_token_seconds": start.first_token_at.as_secs_f64(),
                "packing_seconds": start.packing.as_secs_f64(),
                "file_bytes_from_disk": start.cold.as_ref().map(|c| c.bytes),
                "plain_read_seconds": start.cold.as_ref().map(|c| c.plain.as_secs_f64()),
            },
            "limits": limits_json(limits),
        });
        let mut out = std::io::stdout().lock();
        match self.format {
            BenchFormat::Json => {}
            BenchFormat::Csv => writeln!(out, "{CSV_HEAD}")?,
            BenchFormat::Table => {
                let ms = |d: Duration| format!("{:.0} ms", d.as_secs_f64() * 1e3);
                writeln!(out, "model      {name}, {} active weights per token", size(f.bytes_per_token))?;
                writeln!(out, "device     {}", machine.device)?;
                write_limits(&mut out, machine, limits)?;
                writeln!(
                    out,
                    "start      {} to the first token of a {}-token prompt: {} to load, {} to compute; packed {} later",
                    ms(start.first_token_at),
                    start.prompt,
                    ms(start.load),
                    ms(start.first_token),
                    ms(start.packing)
                )?;
                if let Some(cold) = &start.cold {
                    let rate = |d: Duration| cold.bytes as f64 / d.as_secs_f64() / 1e9;
                    writeln!(
                        out,
                        "           {} came from disk, {:.2} GB/s; plain reading takes {}, {:.2} GB/s",
                        size(cold.bytes),
                        rate(start.first_token_at),
                        ms(cold.plain),
                        rate(cold.plain)
                    )?;
                }
                writeln!(out)?;
                write_row(&mut out, &HEAD.map(String::from), &WIDTHS)?;
                write_rule(&mut out, &WIDTHS)?;
            }
        }
        Ok(out.flush()?)
    }

    /// One test more.
    pub fn add(&mut self, m: Measured) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match self.format {
            BenchFormat::Json => {}
            BenchFormat::Table => write_row(&mut out, &table_row(&m), &WIDTHS)?,
            BenchFormat::Csv => {
                writeln!(out, "{}", csv_row(&m, &m.whole()))?;
                if self.profile {
                    for op in m.ops() {
                        writeln!(out, "{}", csv_row(&m, &op))?;
                    }
                }
            }
        }
        out.flush()?;
        self.tests.push(m);
        Ok(())
    }

    /// What comes after the last test.
    pub fn end(mut self) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match self.format {
            BenchFormat::Csv => {}
            BenchFormat::Json => {
                self.head["tests"] = self.tests.iter().map(|m| test_json(m, self.profile)).collect();
                writeln!(out, "{:#}", self.head)?;
            }
            BenchFormat::Table => {
                for m in self.tests.iter().filter(|_| self.profile) {
                    writeln!(
                        out,
                        "\n{}, batch {}, depth {}, a run by op",
                        m.test.name(),
                        m.test.batch,
                        m.test.depth
                    )?;
                    write_row(&mut out, &OPS_HEAD.map(String::from), &OPS_WIDTHS)?;
                    write_rule(&mut out, &OPS_WIDTHS)?;
                    let total: f64 = m.ops().map(|c| c.seconds).sum();
                    for c in m.ops() {
                        write_row(&mut out, &ops_row(&c, total), &OPS_WIDTHS)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn write_limits(out: &mut impl Write, machine: &Machine, l: &Limits) -> Result<(), Failure> {
    let [f32s, bf16s, bytes] = l.multiply.map(|rate| rate / 1e9);
    writeln!(out, "limits     {} threads read {:.1} GB/s in 2 MiB pages,", machine.threads, l.read / 1e9)?;
    writeln!(out, "           multiply {f32s:.0} (F32), {bf16s:.0} (BF16), {bytes:.0} (8 bits) GOP/s")?;
    Ok(())
}

fn write_row(out: &mut impl Write, cells: &[String], widths: &[usize]) -> Result<(), Failure> {
    for (cell, width) in cells.iter().zip(widths) {
        write!(out, "| {cell:>width$} ")?;
    }
    writeln!(out, "|")?;
    Ok(())
}

fn write_rule(out: &mut impl Write, widths: &[usize]) -> Result<(), Failure> {
    for width in widths {
        write!(out, "|{}", "-".repeat(width + 2))?;
    }
    writeln!(out, "|")?;
    Ok(())
}

fn table_row(m: &Measured) -> [String; 11] {
    let ([median, slowest, fastest], whole) = (m.tokens_per_second(), m.whole());
    let [before, after] = m.limits.map(|l| l.read / 1e9);
    let [multiply_before, multiply_after] = whole.multiply_limits().map(|rate| rate / 1e9);
    [
        m.test.name(),
        m.test.batch.to_string(),
        m.test.depth.to_string(),
        format!("{median:.1}"),
        format!("{slowest:.1}-{fastest:.1}"),
        format!("{:.1}", whole.read() / 1e9),
        format!("{:.0}", whole.read_part() * 100.0),
        format!("{before:.1}-{after:.1}"),
        format!("{:.0}", whole.multiply() / 1e9),
        format!("{:.0}", whole.multiply_part() * 100.0),
        format!("{multiply_before:.0}-{multiply_after:.0}"),
    ]
}

fn ops_row(c: &Cost, total_seconds: f64) -> [String; 9] {
    [
        c.op.to_string(),
        c.calls.to_string(),
        format!("{:.2}", c.seconds * 1e3),
        format!("{:.1}", c.seconds / total_seconds * 100.0),
        format!("{:.1}", c.bytes as f64 / 1e6),
        format!("{:.1}", c.read() / 1e9),
        format!("{:.0}", c.read_part() * 100.0),
        format!("{:.0}", c.multiply() / 1e9),
        format!("{:.0}", c.multiply_part() * 100.0),
    ]
}

/// Names hold no commas, so nothing needs quotes. Figures of tokens belong to whole tests.
fn csv_row(m: &Measured, c: &Cost) -> String {
    let rates = if c.op == "all" { m.tokens_per_second().map(|r| r.to_string()) } else { Default::default() };
    let [before, after] = m.limits.map(|l| l.read);
    let multiply =
        c.multiply_limits().map(|rate| if rate.is_finite() { rate.to_string() } else { String::new() });
    let cells = [
        m.test.name(),
        m.test.batch.to_string(),
        m.test.depth.to_string(),
        c.op.to_string(),
        c.calls.to_string(),
        c.seconds.to_string(),
        rates.join(","),
        c.bytes.to_string(),
        c.read().to_string(),
        before.to_string(),
        after.to_string(),
        c.read_part().to_string(),
        (2 * c.work.total()).to_string(),
        c.multiply().to_string(),
        multiply.join(","),
        c.multiply_part().to_string(),
    ];
    cells.join(",")
}

fn limits_json(l: &Limits) -> Value {
    let [f32s, bf16s, bytes] = l.multiply;
    json!({
        "read_bytes_per_second": l.read,
        "multiply_operations_per_second": { "f32": f32s, "bf16": bf16s, "bytes": bytes },
    })
}

fn test_json(m: &Measured, profile: bool) -> Value {
    let [median, slowest, fastest] = m.tokens_per_second();
    let mut value = cost_json(&m.whole());
    value["test"] = m.test.name().into();
    value["batch"] = m.test.batch.into();
    value["depth"] = m.test.depth.into();
    value["tokens_per_second"] = json!({ "median": median, "slowest": slowest, "fastest": fastest });
    value["limits_before"] = limits_json(&m.limits[0]);
    value["limits_after"] = limits_json(&m.limits[1]);
    if profile {
        let op = |c: Cost| {
            let mut value = cost_json(&c);
            value["op"] = c.op.into();
            value["calls"] = c.calls.into();
            value
        };
        value["ops"] = m.ops().map(op).collect();
    }
    value
}

fn cost_json(c: &Cost) -> Value {
    json!({
        "seconds": c.seconds,
        "bytes": c.bytes,
        "bytes_per_second": c.read(),
        "read_part": c.read_part(),
        "operations": 2 * c.work.total(),
        "operations_per_second": c.multiply(),
        "multiply_part": c.multiply_part(),
    })
}

#[cfg(test)]
mod tests {
    use oxseek_tensor::backend::{MultiplyAdds, OpCost};

    use super::{
        super::test::{Runs, Test},
        *,
    };

    fn measured() -> Measured {
        let limits = Limits { read: 50e9, multiply: [1e11, 2e11, 4e11] };
        let weights = MultiplyAdds { bf16: 1_000_000, ..MultiplyAdds::default() };
        let attention = MultiplyAdds::default();
        let ops = [("embed", MultiplyAdds::default()), ("matmul", weights)];
        let cost = |(op, weights)| OpCost { op, calls: 1, seconds: 0.5, bytes: 10, weights, attention };
        let runs = Runs { seconds: vec![1.0], costs: ops.map(cost).into() };
        runs.measured(Test { prefill: true, tokens: 512, batch: 1, depth: 4096 }, [limits, limits])
    }

    #[test]
    fn every_row_of_the_csv_has_the_columns_of_the_head() {
        let (m, columns) = (measured(), CSV_HEAD.split(',').count());
        for cost in m.ops().chain([m.whole()]) {
            assert_eq!(csv_row(&m, &cost).split(',').count(), columns, "{}", cost.op);
        }
    }

    #[test]
    fn the_json_has_ops_when_they_are_asked_for() {
        let m = measured();
        let value = test_json(&m, true);
        assert_eq!(value["test"], "pp512");
        assert_eq!(value["depth"], 4096);
        assert_eq!(value["tokens_per_second"]["median"], 512.0);
        assert_eq!(value["ops"][1]["op"], "matmul");
        assert_eq!(value["ops"][1]["operations"], 2_000_000);
        assert!(test_json(&m, false)["ops"].is_null());
    }
}

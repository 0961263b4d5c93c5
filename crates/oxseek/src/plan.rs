//! `oxseek plan`: what a model needs before it is loaded, whether that fits, and how fast it will be.

pub mod need;
mod speed;

use std::{io::Write, path::Path};

use oxseek_backend_cpu::{CpuBackend, LimitProbe};
use oxseek_model::{Footprint, LoadOptions};
use oxseek_weights::Checkpoint;
use serde_json::{Value, json};

use self::{
    need::{Experts, Need, place},
    speed::Decoding,
};
use crate::{
    args::{ExpertsArg, ModelArgs, PlanArgs},
    failure::Failure,
    inspect::size,
    memory::Memory,
    open::{context_tokens, cpu_backend, load_options, open_checkpoint},
};

/// Prints the plan. Exit code 1 when the model does not fit.
pub fn plan(args: &PlanArgs) -> Result<(), Failure> {
    let folder = args.path.as_deref().or(args.model.model.as_deref());
    let (name, checkpoint) = open_checkpoint(folder)?;
    let context = context_tokens(&args.model, &checkpoint)?;
    let parallel = usize::from(args.parallel);
    let backend = cpu_backend(&args.model)?;
    let memory = Memory::read(Path::new("/"));
    let plan = Plan::new(&checkpoint, &args.model, context, parallel, backend.threads(), memory);
    let speeds = plan.speeds(&checkpoint, &args.model, &backend)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", plan.json(&name, &speeds))?;
    } else {
        for (label, value) in plan.lines(&name, &speeds) {
            writeln!(out, "{label:<12} {value}")?;
        }
    }
    plan.verdict().map_err(Failure::Run)
}

/// Decides where the experts of a model go that is about to be loaded, and says so when it is not memory.
pub fn place_experts(
    args: &ModelArgs,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    threads: usize,
) -> Experts {
    let need = Need::of(checkpoint, options, args.precision.into(), threads);
    let available = Memory::read(Path::new("/")).map(|m| m.available);
    let experts = place(args.experts, &need, available);
    if experts == Experts::Disk && need.has_experts() {
        let (all, rest) = (size(need.resident(Experts::Ram)), size(need.resident(Experts::Disk)));
        let why = match (args.experts, available) {
            (ExpertsArg::Auto, Some(available)) => {
                format!("the model takes {all}, {} of memory are available", size(available))
            }
            _ => "as asked".into(),
        };
        eprintln!("oxseek: experts stay on disk: {why}; {rest} are kept in memory");
    }
    experts
}

struct Plan {
    need: Need,
    memory: Option<Memory>,
    context: usize,
    context_max: usize,
    parallel: usize,
    cache_per_token: u64,
    asked: ExpertsArg,
    /// Where the experts would go.
    experts: Experts,
}

/// Tokens per second at the limit, and as far as one usually comes.
struct Speed {
    sequences: usize,
    depth: usize,
    tokens_per_second: [f64; 2],
}

impl Plan {
    fn new(
        checkpoint: &Checkpoint,
        args: &ModelArgs,
        context: usize,
        parallel: usize,
        threads: usize,
        memory: Option<Memory>,
    ) -> Self {
        let options = load_options(context, parallel, args.cache_format());
        let need = Need::of(checkpoint, &options, args.precision.into(), threads);
        Self {
            experts: place(args.experts, &need, memory.map(|m| m.available)),
            need,
            memory,
            context,
            context_max: checkpoint.config().max_position_embeddings,
            parallel,
            cache_per_token: Footprint::of(checkpoint, options.cache_format).cache_bytes_per_token,
            asked: args.experts,
        }
    }

    /// Decoding alone and with all sequences, at the beginning and at the end of the context.
    fn speeds(
        &self,
        checkpoint: &Checkpoint,
        args: &ModelArgs,
        backend: &CpuBackend,
    ) -> Result<Vec<Speed>, Failure> {
        let probe = LimitProbe::new(backend.level(), backend.threads());
        let limits = probe.map_err(|e| Failure::Run(e.to_string()))?.measure();
        let decoding = Decoding::of(checkpoint, args.precision.into(), args.cache_format());
        let mut speeds = Vec::new();
        for sequences in if self.parallel > 1 { vec![1, self.parallel] } else { vec![1] } {
            for depth in [0, self.context] {
                let tokens_per_second = decoding.tokens_per_second(&limits, sequences, depth);
                speeds.push(Speed { sequences, depth, tokens_per_second });
            }
        }
        Ok(speeds)
    }

    fn lines(&self, name: &str, speeds: &[Speed]) -> Vec<(&'static str, String)> {
        let n = &self.need;
        let mut lines = vec![("model", name.to_string())];
        lines.push((
            "memory",
            self.memory.map_or("unknown on this system".into(), |m| {
                let limit = m.group_limit.map(|l| format!(", of {} that the control group allows", size(l)));
                format!("{} available of {}{}", size(m.available), size(m.total), limit.unwrap_or_default())
            }),
        ));
        lines.push(("files", format!("{}, mapped; the system may drop their pages", size(n.files))));
        let dense = format!(
            "{} packed + {} as stored + {} made at load",
            size(n.packed),
            size(n.as_stored),
            size(n.made)
        );
        lines.push(("weights", format!("{dense}, without routed experts")));
        if n.has_experts() {
            let place = match self.experts {
                Experts::Ram => "in memory",
                Experts::Disk => "stay on disk: read when they are chosen, kept while there is memory",
            };
            let bytes = size(n.experts_packed + n.experts_as_stored);
            lines.push(("experts", format!("{bytes}, {place}")));
        }
        let each = size(self.cache_per_token);
        lines.push((
            "cache",
            format!("{} for {} x {} tokens, {each} each", size(n.cache), self.parallel, self.context),
        ));
        lines.push(("scratch", size(n.scratch)));
        let (resident, peak) = (n.resident(self.experts), n.peak(self.experts));
        lines.push(("in all", format!("{}, at most {} while packing", size(resident), size(peak))));
        for s in speeds {
            let [limit, usual] = s.tokens_per_second;
            let depth = if s.depth == 0 { "at first".into() } else { format!("after {} tokens", s.depth) };
            let sequences =
                if s.sequences == 1 { "one answer".into() } else { format!("{} answers", s.sequences) };
            lines.push((
                "decoding",
                format!("{sequences}, {depth}: about {usual:.1} tokens/s, limit {limit:.1}"),
            ));
        }
        if self.experts == Experts::Disk && n.has_experts() {
            lines.push(("", "these are with all experts in memory; from disk its speed decides".into()));
        }
        lines
    }

    /// `Err` with what would fit.
    fn verdict(&self) -> Result<(), String> {
        let Some(memory) = self.memory else { return Ok(()) };
        let (n, available) = (&self.need, memory.available);
        // What is not asked for in words is in memory.
        let wanted = if self.asked == ExpertsArg::Disk { Experts::Disk } else { Experts::Ram };
        if n.fits(wanted, available) {
            return Ok(());
        }
        let mut ways = Vec::new();
        let context = |experts| {
            let tokens = n.largest_context(experts, available, self.cache_per_token, self.parallel)?;
            Some(tokens.min(self.context_max)).filter(|t| *t < self.context)
        };
        if let Some(tokens) = context(wanted) {
            ways.push(format!("--ctx {tokens}"));
        }
        if wanted == Experts::Ram && n.has_experts() {
            if n.fits(Experts::Disk, available) {
                ways.push("--experts disk".into());
            } else if let Some(tokens) = context(Experts::Disk) {
                ways.push(format!("--experts disk --ctx {tokens}"));
            }
        }
        let would = match ways.as_slice() {
            [] => "nothing of it would".into(),
            ways => format!("{} would", ways.join(" or ")),
        };
        let peak = size(n.peak(wanted));
        Err(format!("does not fit: {peak} needed, {} available; {would}", size(available)))
    }

    fn json(&self, name: &str, speeds: &[Speed]) -> Value {
        let n = &self.need;
        let speed = |s: &Speed| {
            let [limit, usual] = s.tokens_per_second;
            json!({ "sequences": s.sequences, "depth": s.depth, "tokens_per_second": usual, "limit": limit })
        };
        let verdict = self.verdict();
        json!({
            "model": name,
            "context": self.context,
            "parallel": self.parallel,
            "memory": self.memory.map(|m| json!({
                "total": m.total, "available": m.available, "group_limit": m.group_limit,
            })),
            "files_bytes": n.files,
            "packed_bytes": n.packed,
            "as_stored_bytes": n.as_stored,
            "made_bytes": n.made,
            "experts_packed_bytes": n.experts_packed,
            "experts_as_stored_bytes": n.experts_as_stored,
            "cache_bytes": n.cache,
            "scratch_bytes": n.scratch,
            "resident_bytes": n.resident(self.experts),
            "peak_bytes": n.peak(self.experts),
            "experts": if self.experts == Experts::Ram { "ram" } else { "disk" },
            "fits": verdict.is_ok(),
            "why": verdict.err(),
            "decoding": speeds.iter().map(speed).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use oxseek_backend_cpu::Precision;
    use oxseek_model::kv::blocks_for;

    use oxseek_tensor::CacheFormat;

    use super::*;

    const GB: u64 = 1_000_000_000;

    fn plan(available: u64, asked: ExpertsArg) -> Plan {
        let need = Need {
            packed: 2 * GB,
            experts_packed: 8 * GB,
            cache: 4 * GB,
            scratch: GB / 2,
            ..Need::default()
        };
        let memory = Some(Memory { total: 64 * GB, available, group_limit: None });
        let experts = place(asked, &need, Some(available));
        Plan {
            need,
            memory,
            context: 4096,
            context_max: 8192,
            parallel: 4,
            cache_per_token: 4 * GB / 4 / 4096,
            asked,
            experts,
        }
    }

    #[test]
    fn what_fits_passes_and_what_does_not_says_what_would() {
        assert_eq!(plan(15 * GB, ExpertsArg::Auto).verdict(), Ok(()));
        let why = plan(13 * GB, ExpertsArg::Auto).verdict().unwrap_err();
        assert!(why.contains("14.50 GB needed, 13.00 GB available"), "{why}");
        assert!(why.contains("--ctx 2240 or --experts disk would"), "{why}");
        let why = plan(5 * GB, ExpertsArg::Auto).verdict().unwrap_err();
        assert!(why.contains("; --experts disk --ctx 2240 would"), "{why}");
        assert_eq!(plan(7 * GB, ExpertsArg::Disk).verdict(), Ok(()));
        let why = plan(GB, ExpertsArg::Ram).verdict().unwrap_err();
        assert!(why.contains("nothing of it would"), "{why}");
    }

    #[test]
    fn the_json_says_whether_it_fits() {
        let (fits, short) = (plan(15 * GB, ExpertsArg::Auto), plan(13 * GB, ExpertsArg::Auto));
        let value = fits.json("m", &[]);
        assert_eq!((&value["fits"], &value["experts"]), (&json!(true), &json!("ram")));
        assert_eq!(value["resident_bytes"], 14 * GB + GB / 2);
        let value = short.json("m", &[]);
        assert_eq!((&value["fits"], &value["experts"]), (&json!(false), &json!("disk")));
        assert_eq!(value["resident_bytes"], 6 * GB + GB / 2);
    }

    #[test]
    fn sizes_of_the_demo_model_add_up() {
        let Ok((_, checkpoint)) = open_checkpoint(None) else { return };
        let need = Need::of(&checkpoint, &load_options(256, 2, CacheFormat::Bf16), Precision::Native, 2);
        let all = need.packed + need.as_stored + need.experts_packed + need.experts_as_stored;
        // Packing pads rows to groups; norms and biases are not matrices.
        assert!(all <= need.files + need.files / 20 && all >= need.files - need.files / 20, "{need:?}");
        assert_eq!(
            need.cache,
            2 * blocks_for(256) as u64
                * 64
                * Footprint::of(&checkpoint, CacheFormat::Bf16).cache_bytes_per_token
        );
    }
}

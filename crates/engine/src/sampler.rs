//! From a row of logits to a token.

use thiserror::Error;

use crate::{Sampling, TokenMask};

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    /// Ids from here on have logits but no text.
    vocab_text: usize,
    bans: Bans,
    scratch: Scratch,
}

/// Tokens that are not chosen, whatever the logits say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bans {
    /// Never.
    pub always: Vec<u32>,
    /// Not as one of the first tokens of an answer.
    pub early: Vec<u32>,
    /// How many the first ones are.
    pub early_tokens: usize,
}

/// Which tokens a constraint lets through, before anything else is looked at.
#[derive(Debug, Clone, Copy)]
pub enum Gate<'a> {
    /// All.
    Open,
    /// Those of the mask.
    Mask(&'a TokenMask),
    /// These, even where they are banned.
    Only(&'a [u32]),
}

impl Gate<'_> {
    fn lets(self, id: usize) -> bool {
        match self {
            Gate::Open => true,
            Gate::Mask(mask) => mask.allows(id as u32),
            Gate::Only(ids) => ids.contains(&(id as u32)),
        }
    }
}

/// Why no token could be chosen. The messages are fit for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SampleError {
    /// The row is broken.
    #[error("the model gave no finite logits")]
    NotFinite,
    /// The constraint, bans and bias together leave nothing.
    #[error("the constraint on the answer and the logit bias leave no token to choose")]
    NothingAllowed,
}

/// Memory that is kept from token to token.
#[derive(Debug, Default)]
struct Scratch {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
    seen: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    /// A logit; from [`Sampler::draw`] on an unnormalised probability.
    weight: f32,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model as it is (0 when not asked for).
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for answer number `choice`. Ids from `vocab_text` on are never chosen.
    pub fn new(sampling: Sampling, choice: usize, random_seed: u64, vocab_text: usize, bans: Bans) -> Self {
        let seed = mix(sampling.seed.unwrap_or(random_seed)) ^ mix(choice as u64 + 1);
        Self { sampling, seed, vocab_text, bans, scratch: Scratch::default() }
    }

    /// Chooses the token that follows `prompt` and `answer` among those that `gate` lets through. The draw depends on
    /// the seed and on the position alone.
    ///
    /// # Errors
    /// [`SampleError`]
    pub fn sample(
        &mut self,
        row: &[f32],
        prompt: &[u32],
        answer: &[u32],
        gate: Gate<'_>,
        logprobs: Option<usize>,
    ) -> Result<Sampled, SampleError> {
        let row = &row[..row.len().min(self.vocab_text)];
        let plain = matches!(gate, Gate::Open) && self.is_plain(answer.len());
        let id = if plain { argmax(row) } else { self.choose(row, prompt, answer, gate) };
        let id = id.ok_or_else(|| {
            let broken = !row.iter().any(|l| l.is_finite());
            if broken { SampleError::NotFinite } else { SampleError::NothingAllowed }
        })?;
        let (logprob, top) = match logprobs {
            Some(n) => log_probabilities(row, gate, id, n),
            None => (0.0, Vec::new()),
        };
        Ok(Sampled { id, logprob, top })
    }

    /// Greedy over the model's own logits: no copy of the row is needed.
    fn is_plain(&self, position: usize) -> bool {
        let banned = !self.bans.always.is_empty() || position < self.bans.early_tokens;
        self.sampling.temperature == 0.0 && !self.changes_logits() && !banned
    }

    fn changes_logits(&self) -> bool {
        let s = &self.sampling;
        !s.logit_bias.is_empty() || s.repetition_penalty != 1.0 || self.counts_answer()
    }

    fn counts_answer(&self) -> bool {
        self.sampling.presence_penalty != 0.0 || self.sampling.frequency_penalty != 0.0
    }

    fn choose(&mut self, row: &[f32], prompt: &[u32], answer: &[u32], gate: Gate<'_>) -> Option<u32> {
        let mut logits = std::mem::take(&mut self.scratch.logits);
        logits.clear();
        logits.extend_from_slice(row);
        if !matches!(gate, Gate::Open) {
            let shut = logits.iter_mut().enumerate().filter(|(id, _)| !gate.lets(*id));
            shut.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        }
        self.bias(&mut logits);
        if !matches!(gate, Gate::Only(_)) {
            self.ban(&mut logits, answer.len());
        }
        self.penalize(&mut logits, prompt, answer);
        let id = if self.sampling.temperature == 0.0 {
            argmax(&logits)
        } else {
            self.draw(&logits, answer.len() as u64)
        };
        self.scratch.logits = logits;
        id
    }

    fn bias(&self, logits: &mut [f32]) {
        for &(id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                // OpenAI: -100 bans a token.
                *logit = if bias <= -100.0 { f32::NEG_INFINITY } else { *logit + bias };
            }
        }
    }

    fn ban(&self, logits: &mut [f32], position: usize) {
        let early = if position < self.bans.early_tokens { self.bans.early.as_slice() } else { &[] };
        for &id in self.bans.always.iter().chain(early) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    fn penalize(&mut self, logits: &mut [f32], prompt: &[u32], answer: &[u32]) {
        let s = &self.sampling;
        let window = if s.penalty_window == 0 { usize::MAX } else { s.penalty_window };
        let answer_tail = &answer[answer.len().saturating_sub(window)..];
        let seen = &mut self.scratch.seen;
        if s.repetition_penalty != 1.0 {
            let prompt_tail = &prompt[prompt.len().saturating_sub(window - answer_tail.len())..];
            seen.clear();
            seen.extend(prompt_tail.iter().chain(answer_tail));
            seen.sort_unstable();
            seen.dedup();
            for &id in seen.iter() {
                if let Some(logit) = logits.get_mut(id as usize) {
                    let up = *logit > 0.0;
                    *logit = if up { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
                }
            }
        }
        if self.counts_answer() {
            let s = &self.sampling;
            let seen = &mut self.scratch.seen;
            seen.clear();
            seen.extend(answer_tail);
            seen.sort_unstable();
            for same in seen.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(same[0] as usize) {
                    *logit -= s.presence_penalty + s.frequency_penalty * same.len() as f32;
                }
            }
        }
    }

    /// Draws from the tokens that the filters leave.
    fn draw(&mut self, logits: &[f32], position: u64) -> Option<u32> {
        let s = &self.sampling;
        let top = logits.iter().copied().filter(|l| l.is_finite()).fold(f32::NEG_INFINITY, f32::max);
        if !top.is_finite() {
            return None;
        }
        // Only differences count, so the largest weight is exactly 1 and nothing overflows.
        let weight = |logit: f32| ((logit - top) / s.temperature).exp();
        let candidates = &mut self.scratch.candidates;
        candidates.clear();
        let finite = logits.iter().enumerate().filter(|(_, l)| l.is_finite());
        candidates.extend(finite.map(|(id, &l)| Candidate { id: id as u32, weight: weight(l) }));
        candidates.retain(|c| c.weight > 0.0);
        keep_top_k(candidates, s.top_k);
        keep_typical(candidates, s.typical_p);
        keep_top_p(candidates, s.top_p);
        let most = candidates.iter().fold(0.0, |m: f32, c| m.max(c.weight));
        candidates.retain(|c| c.weight >= s.min_p * most);
        let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
        let mut left = uniform(self.seed, position) * total;
        for c in candidates.iter() {
            left -= f64::from(c.weight);
            if left < 0.0 {
                return Some(c.id);
            }
        }
        candidates.last().map(|c| c.id)
    }
}

/// The most likely token; of equal ones the one with the lowest id.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32)
}

/// Most likely first; equal ones by id, so that the order does not depend on what came before.
fn by_weight(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

fn keep_top_k(candidates: &mut Vec<Candidate>, top_k: usize) {
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, by_weight);
        candidates.truncate(top_k);
    }
    // The draw walks the list: its order must be a function of the logits alone.
    candidates.sort_unstable_by_key(|c| c.id);
}

fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let enough = total * f64::from(top_p);
    // The nucleus is nearly always small: sort a growing head of the list instead of all of a large vocabulary.
    let mut head = 256;
    loop {
        let sorted = head.min(candidates.len());
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted - 1, by_weight);
        }
        candidates[..sorted].sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let reached = candidates[..sorted].iter().position(|c| {
            sum += f64::from(c.weight);
            sum >= enough
        });
        if reached.is_some() || sorted == candidates.len() {
            candidates.truncate(reached.map_or(sorted, |last| last + 1));
            return;
        }
        head *= 8;
    }
}

/// Keeps tokens whose surprise is nearest to the expected surprise, up to a probability of `typical_p`.
fn keep_typical(candidates: &mut Vec<Candidate>, typical_p: f32) {
    if typical_p >= 1.0 {
        return;
    }
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let surprise = |c: &Candidate| -(f64::from(c.weight) / total).ln();
    let entropy: f64 = candidates.iter().map(|c| f64::from(c.weight) / total * surprise(c)).sum();
    let distance = |c: &Candidate| (surprise(c) - entropy).abs();
    candidates.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
    let mut sum = 0.0;
    let last = candidates.iter().position(|c| {
        sum += f64::from(c.weight) / total;
        sum >= f64::from(typical_p)
    });
    candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
}

/// A token of a prompt as if it had been chosen.
pub(crate) fn score(row: &[f32], id: u32, n: usize) -> Sampled {
    let (logprob, top) = log_probabilities(row, Gate::Open, id, n);
    Sampled { id, logprob, top }
}

/// How many tokens of a row are at least as likely as `id`: 1 for the most likely one.
pub(crate) fn rank(row: &[f32], id: u32) -> usize {
    let logit = row[id as usize];
    row.iter().filter(|&&l| l >= logit).count()
}

/// Log-probability of `id`, and the `n` most likely tokens with theirs, among those that `gate` lets through.
pub(crate) fn log_probabilities(logits: &[f32], gate: Gate<'_>, id: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let finite = || logits.iter().enumerate().filter(|&(id, l)| l.is_finite() && gate.lets(id));
    let top = finite().fold(f32::NEG_INFINITY, |m, (_, &l)| m.max(l));
    let sum: f64 = finite().map(|(_, &l)| f64::from(l - top).exp()).sum();
    let logprob = |logit: f32| (f64::from(logit - top) - sum.ln()) as f32;
    let mut best: Vec<Candidate> = finite().map(|(i, &l)| Candidate { id: i as u32, weight: l }).collect();
    let n = n.min(best.len());
    if n > 0 && n < best.len() {
        best.select_nth_unstable_by(n - 1, by_weight);
    }
    best.truncate(n);
    best.sort_unstable_by(by_weight);
    (logprob(logits[id as usize]), best.iter().map(|c| (c.id, logprob(c.weight))).collect())
}

/// SplitMix64's finaliser (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Uniform in `0..1`. A function of seed and position: a sequence that is computed again draws the same tokens.
fn uniform(seed: u64, position: u64) -> f64 {
    (mix(seed ^ mix(position)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut sampling = Sampling { seed: Some(1), ..Sampling::default() };
        change(&mut sampling);
        Sampler::new(sampling, 0, 0, usize::MAX, Bans::default())
    }

    /// How often each token is drawn in 20,000 positions.
    fn frequencies(s: &mut Sampler, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..20_000 {
            let answer = vec![u32::MAX; position % 20_000];
            // Positions beyond the vocabulary leave penalties out of it.
            counts[s.sample(logits, &[], &answer, Gate::Open, None).expect("finite").id as usize] +=
                1.0 / 20_000.0;
        }
        counts
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    fn softmax(logits: &[f32], t: f32) -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|&l| f64::from(l / t).exp()).collect();
        e.iter().map(|x| x / e.iter().sum::<f64>()).collect()
    }

    type Change = fn(&mut Sampling);

    #[test]
    fn draws_follow_the_filtered_distribution() {
        let p = softmax(&LOGITS, 1.0);
        let renormalised = |keep: &[usize]| {
            let total: f64 = keep.iter().map(|&i| p[i]).sum();
            (0..4).map(|i| if keep.contains(&i) { p[i] / total } else { 0.0 }).collect::<Vec<_>>()
        };
        let cases: [(&str, Change, Vec<f64>); 7] = [
            ("plain", |_| {}, p.clone()),
            ("temperature", |s| s.temperature = 2.0, softmax(&LOGITS, 2.0)),
            ("top_k", |s| s.top_k = 2, renormalised(&[1, 2])),
            ("top_p", |s| s.top_p = 0.85, renormalised(&[1, 2])),
            ("top_p tiny", |s| s.top_p = 0.0, renormalised(&[1])),
            ("min_p", |s| s.min_p = 0.3, renormalised(&[1, 2])),
            ("bias", |s| s.logit_bias = vec![(1, -100.0)], renormalised(&[0, 2, 3])),
        ];
        for (name, change, expected) in cases {
            let found = frequencies(&mut sampler(change), &LOGITS);
            for (f, e) in found.iter().zip(&expected) {
                assert!((f - e).abs() < 0.015, "{name}: {found:?}, expected {expected:?}");
            }
        }
    }

    #[test]
    fn typical_keeps_what_is_as_surprising_as_expected() {
        // Entropy 1.5 bits: the token of probability 1/4 is nearest, the likeliest one next.
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let found = frequencies(&mut sampler(|s| s.typical_p = 0.7), &logits);
        assert!(found[2] == 0.0 && found[3] == 0.0 && (found[0] - 2.0 / 3.0).abs() < 0.015, "{found:?}");
    }

    #[test]
    fn penalties_move_logits_as_documented() {
        let mut logits = [2.0, -2.0, 1.0, 0.5];
        sampler(|s| s.repetition_penalty = 2.0).penalize(&mut logits, &[0], &[1, 1]);
        assert_eq!(logits, [1.0, -4.0, 1.0, 0.5]);
        let mut logits = [2.0, 2.0, 2.0, 2.0];
        let mut s = sampler(|s| (s.presence_penalty, s.frequency_penalty) = (0.5, 0.25));
        s.penalize(&mut logits, &[0], &[1, 2, 1]);
        assert_eq!(logits, [2.0, 1.0, 1.25, 2.0]);
        let mut logits = [2.0, 2.0, 2.0, 2.0];
        let mut s = sampler(|s| (s.repetition_penalty, s.penalty_window) = (2.0, 2));
        s.penalize(&mut logits, &[0, 1], &[2]);
        assert_eq!(logits, [2.0, 1.0, 1.0, 2.0]);
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_and_never_a_banned_one() {
        let mut greedy = sampler(|s| s.temperature = 0.0);
        let row = [1.0, 3.0, 3.0];
        assert_eq!(greedy.sample(&row, &[], &[], Gate::Open, None).map(|s| s.id), Ok(1));
        let sampling = || Sampling { temperature: 0.0, ..Sampling::default() };
        let bans = Bans { always: vec![1], ..Bans::default() };
        let mut banned = Sampler::new(sampling(), 0, 0, usize::MAX, bans);
        assert_eq!(banned.sample(&row, &[], &[], Gate::Open, None).map(|s| s.id), Ok(2));
        let mut short = Sampler::new(sampling(), 0, 0, 1, Bans::default());
        assert_eq!(short.sample(&row, &[], &[], Gate::Open, None).map(|s| s.id), Ok(0));
        let bans = Bans { early: vec![1], early_tokens: 1, ..Bans::default() };
        let mut late = Sampler::new(sampling(), 0, 0, usize::MAX, bans);
        assert_eq!(late.sample(&row, &[], &[], Gate::Open, None).map(|s| s.id), Ok(2));
        assert_eq!(late.sample(&row, &[], &[0], Gate::Open, None).map(|s| s.id), Ok(1));
    }

    #[test]
    fn a_gate_goes_before_everything_else() {
        let mut mask = TokenMask::new(4);
        [0, 3].into_iter().for_each(|id| mask.allow(id));
        let found = |gate, change: Change| {
            let mut s = sampler(change);
            s.sample(&LOGITS, &[], &[], gate, Some(4))
        };
        for temperature in [0.0, 1.0] {
            let change: Change = if temperature == 0.0 { |s| s.temperature = 0.0 } else { |s| s.top_k = 1 };
            let sampled = found(Gate::Mask(&mask), change).expect("two are allowed");
            assert_eq!(sampled.id, 0);
            // The probabilities are those among the allowed ones.
            let p = softmax(&[0.0, -1.0], 1.0);
            assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 3]);
            assert!((f64::from(sampled.logprob) - p[0].ln()).abs() < 1e-6);
        }
        let empty = TokenMask::new(4);
        let nothing = found(Gate::Mask(&empty), |_| {});
        assert_eq!(nothing, Err(SampleError::NothingAllowed));
        let biased = found(Gate::Mask(&mask), |s| s.logit_bias = vec![(0, -100.0), (3, -100.0)]);
        assert_eq!(biased, Err(SampleError::NothingAllowed));
        // Where an answer must end, a ban on end tokens does not count.
        let bans = Bans { always: vec![2], ..Bans::default() };
        let mut s = Sampler::new(Sampling::default(), 0, 0, usize::MAX, bans);
        assert_eq!(s.sample(&LOGITS, &[], &[], Gate::Only(&[2]), None).map(|s| s.id), Ok(2));
    }

    #[test]
    fn broken_logits_are_never_chosen() {
        let row = [f32::NAN, f32::NEG_INFINITY, 1.0, f32::INFINITY];
        for temperature in [0.0, 1.0] {
            let mut s = sampler(|s| s.temperature = temperature);
            assert_eq!(s.sample(&row, &[], &[], Gate::Open, Some(4)).map(|s| s.id), Ok(2));
            let broken = s.sample(&[f32::NAN; 3], &[], &[], Gate::Open, None);
            assert_eq!(broken, Err(SampleError::NotFinite));
        }
    }

    #[test]
    fn logprobs_are_the_models_own() {
        let mut s = sampler(|s| (s.temperature, s.logit_bias) = (0.0, vec![(1, -100.0)]));
        let sampled = s.sample(&LOGITS, &[], &[], Gate::Open, Some(2)).expect("finite");
        let p = softmax(&LOGITS, 1.0);
        assert_eq!(sampled.id, 2);
        assert!((f64::from(sampled.logprob) - p[2].ln()).abs() < 1e-6);
        assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_seed_fixes_the_draws_and_choices_differ() {
        let logits = vec![0.0; 1000];
        let draw = |seed, choice| {
            let sampling = Sampling { seed: Some(seed), ..Sampling::default() };
            let mut s = Sampler::new(sampling, choice, 0, usize::MAX, Bans::default());
            (0..10)
                .map(|n| s.sample(&logits, &[], &vec![0; n], Gate::Open, None).map(|s| s.id))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(5, 0), draw(5, 0));
        assert_ne!(draw(5, 0), draw(5, 1));
        assert_ne!(draw(5, 0), draw(6, 0));
    }

    #[test]
    fn a_large_nucleus_equals_a_full_sort() {
        let logits: Vec<f32> = (0..5000).map(|i| (mix(i) >> 40) as f32 / (1 << 24) as f32).collect();
        let mut all: Vec<Candidate> =
            logits.iter().enumerate().map(|(i, l)| Candidate { id: i as u32, weight: l.exp() }).collect();
        let mut kept = all.clone();
        keep_top_p(&mut kept, 0.7);
        all.sort_by(by_weight);
        assert_eq!(
            kept.iter().map(|c| c.id).collect::<Vec<_>>(),
            all[..kept.len()].iter().map(|c| c.id).collect::<Vec<_>>()
        );
        assert!(kept.len() > 256);
    }
}

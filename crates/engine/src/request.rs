//! Requests at the engine's door, and what comes back.

use std::{sync::Arc, time::Duration};

use thiserror::Error;

use crate::Grammar;

/// How tokens are chosen. The steps run in this order: the request's constraint, logit bias, penalties, temperature,
/// `top_k`, `typical_p`, `top_p`, `min_p`, draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Drop tokens less likely than this part of the most likely one.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al. 2022): keep tokens of typical surprise up to this probability.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred, prompt included (CTRL, section 4.1).
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the answer so far.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of tokens in the answer so far.
    pub frequency_penalty: f32,
    /// How many of the last tokens the penalties look at; 0 looks at all.
    pub penalty_window: usize,
    /// Added to the logits of these tokens; -100 or less bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text; none takes a random one.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// What is done with a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Task {
    /// It is continued.
    #[default]
    Generate,
    /// The hidden state of its last token is the answer ([`Event::Embedding`]); nothing is generated.
    Embed,
}

/// What is asked of the engine.
#[derive(Clone)]
pub struct Request {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Most tokens of an answer; it also ends where the context is full.
    pub max_tokens: Option<usize>,
    /// An answer does not end by an end token, a stop token or a stop string before it has this many tokens.
    pub min_tokens: usize,
    /// Answers to the same prompt.
    pub n: usize,
    /// Texts that end an answer; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end an answer besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Never choose the tokens that end an answer: for measuring.
    pub ignore_eos: bool,
    /// Show special tokens in the text. Their ids are in the events in any case.
    pub keep_special: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Report log-probabilities: of the chosen token and of this many of the most likely ones.
    pub logprobs: Option<usize>,
    /// What the answers may say; none lets them say anything.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Report the log-probability of every token of the prompt but the first, and this many of the most likely ones.
    /// The whole prompt is computed then, whatever is in the cache.
    pub prompt_logprobs: Option<usize>,
    /// What to do with the prompt.
    pub task: Task,
    /// Report how far the prompt is ([`Event::Progress`]).
    pub progress: bool,
    /// Only requests with the same salt share cached beginnings.
    pub cache_salt: Option<Arc<str>>,
    /// Whom the request is for: tenants of equal priority take turns by tokens.
    pub tenant: u64,
    /// Smaller goes first, as in vLLM.
    pub priority: i32,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_tokens: None,
            min_tokens: 0,
            n: 1,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            keep_special: false,
            sampling: Sampling::default(),
            logprobs: None,
            grammar: None,
            prompt_logprobs: None,
            task: Task::Generate,
            progress: false,
            cache_salt: None,
            tenant: 0,
            priority: 0,
        }
    }
}

/// What an engine accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest sequence, prompt and answer together.
    pub context_tokens_max: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// Most answers to one request.
    pub n_max: usize,
    /// Most stop strings.
    pub stop_strings_max: usize,
    /// Longest stop string.
    pub stop_bytes_max: usize,
    /// Most stop tokens.
    pub stop_tokens_max: usize,
    /// Most alternatives reported per token.
    pub logprobs_max: usize,
    /// Most entries of the logit bias.
    pub logit_bias_max: usize,
    /// Rows of logits in a step that prompts may be scored with; without any, `prompt_logprobs` is refused.
    pub score_rows_max: usize,
    /// Width of an embedding.
    pub embedding_width: usize,
}

/// A request that an engine cannot take. The message never quotes the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {message}")]
pub struct RequestError {
    /// The field, by its OpenAI name.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// A request that is valid by construction: every id and every size is within the engine's limits.
#[derive(Clone)]
pub struct ValidRequest(pub(crate) Request);

impl ValidRequest {
    /// Most tokens that the request can take: its prompt and all of its answers at their longest.
    pub fn tokens_max(&self) -> usize {
        self.0.prompt.len() + self.0.n * self.0.max_tokens.unwrap_or(0)
    }

    /// Makes it the request of a tenant: tenants take turns, and share no beginnings in the cache. 0 is nobody.
    #[must_use]
    pub fn on_behalf_of(mut self, tenant: u64) -> Self {
        self.0.tenant = tenant;
        if tenant != 0 {
            // A salt of the client's own stays apart too.
            let own = self.0.cache_salt.as_deref().unwrap_or_default();
            self.0.cache_salt = Some(format!("{tenant:016x}/{own}").into());
        }
        self
    }
}

impl Request {
    /// Checks the request against an engine's limits.
    ///
    /// # Errors
    /// [`RequestError`], naming the first field that is wrong.
    pub fn validate(mut self, limits: &EngineLimits) -> Result<ValidRequest, RequestError> {
        self.check_prompt(limits)?;
        self.check_ends(limits)?;
        self.sampling.check(limits)?;
        refuse_if(self.n == 0 || self.n > limits.n_max, "n", || {
            format!("{} is not between 1 and {}", self.n, limits.n_max)
        })?;
        refuse_if(self.logprobs.is_some_and(|n| n > limits.logprobs_max), "logprobs", || {
            format!("at most {} alternatives", limits.logprobs_max)
        })?;
        refuse_if(self.prompt_logprobs.is_some_and(|n| n > limits.logprobs_max), "prompt_logprobs", || {
            format!("at most {} alternatives", limits.logprobs_max)
        })?;
        refuse_if(self.prompt_logprobs.is_some() && limits.score_rows_max == 0, "prompt_logprobs", || {
            "this engine was made without room for logits of prompts".into()
        })?;
        let asked = self.max_tokens.unwrap_or(usize::MAX);
        refuse_if(self.min_tokens > asked, "min_tokens", || format!("is more than max_tokens, {asked}"))?;
        let embeds = self.task == Task::Embed;
        refuse_if(embeds && self.n > 1, "n", || "must be 1 for an embedding".into())?;
        let room = if embeds { 0 } else { limits.context_tokens_max - self.prompt.len() };
        self.max_tokens = Some(asked.min(room));
        Ok(ValidRequest(self))
    }

    fn check_prompt(&self, limits: &EngineLimits) -> Result<(), RequestError> {
        refuse_if(self.prompt.is_empty(), "prompt", || "has no tokens".into())?;
        let (tokens, most) = (self.prompt.len(), limits.context_tokens_max);
        let embeds = self.task == Task::Embed;
        refuse_if(embeds && tokens > most, "prompt", || {
            format!("has {tokens} tokens, more than a context of {most} tokens")
        })?;
        refuse_if(!embeds && tokens >= most, "prompt", || {
            format!("has {tokens} tokens and leaves no room for an answer in a context of {most} tokens")
        })?;
        check_ids(&self.prompt, limits, "prompt")
    }

    fn check_ends(&self, limits: &EngineLimits) -> Result<(), RequestError> {
        refuse_if(self.max_tokens == Some(0), "max_tokens", || "must be at least 1".into())?;
        refuse_if(self.stop.len() > limits.stop_strings_max, "stop", || {
            format!("has {} strings, at most {} allowed", self.stop.len(), limits.stop_strings_max)
        })?;
        refuse_if(self.stop.iter().any(String::is_empty), "stop", || "a stop string is empty".into())?;
        refuse_if(self.stop.iter().any(|s| s.len() > limits.stop_bytes_max), "stop", || {
            format!("a stop string is longer than {} bytes", limits.stop_bytes_max)
        })?;
        refuse_if(self.stop_tokens.len() > limits.stop_tokens_max, "stop_token_ids", || {
            format!("at most {} allowed", limits.stop_tokens_max)
        })?;
        check_ids(&self.stop_tokens, limits, "stop_token_ids")
    }
}

impl Sampling {
    fn check(&self, limits: &EngineLimits) -> Result<(), RequestError> {
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("typical_p", self.typical_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        refuse_if(self.logit_bias.len() > limits.logit_bias_max, "logit_bias", || {
            format!("has {} entries, at most {} allowed", self.logit_bias.len(), limits.logit_bias_max)
        })?;
        for &(id, bias) in &self.logit_bias {
            check_ids(&[id], limits, "logit_bias")?;
            within("logit_bias", bias, -100.0, 100.0)?;
        }
        Ok(())
    }
}

fn refuse_if(wrong: bool, field: &'static str, message: impl FnOnce() -> String) -> Result<(), RequestError> {
    if wrong { Err(RequestError { field, message: message() }) } else { Ok(()) }
}

fn check_ids(ids: &[u32], limits: &EngineLimits, field: &'static str) -> Result<(), RequestError> {
    match ids.iter().find(|&&id| id as usize >= limits.vocab) {
        Some(id) => Err(RequestError {
            field,
            message: format!("token id {id} is not in the vocabulary of {}", limits.vocab),
        }),
        None => Ok(()),
    }
}

/// NaN is within nothing.
fn within(field: &'static str, value: f32, from: f32, to: f32) -> Result<(), RequestError> {
    refuse_if(!(from..=to).contains(&value), field, || format!("{value} is not between {from} and {to}"))
}

/// What a request's reader gets, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is being computed. Comes after a step that left a part of it, where asked for, and is left out when
    /// the reader is behind.
    Progress {
        /// Tokens of the prompt that are in the cache.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
        /// Tokens that were in the cache already.
        cached: usize,
    },
    /// Log-probabilities of the prompt, in order, where asked for. Comes before the first delta, in one or more pieces.
    PromptLogprobs {
        /// Place of the first of the tokens in the prompt; the very first token of the prompt has no probability.
        start: usize,
        /// The tokens.
        tokens: Vec<TokenInfo>,
        /// How many tokens are at least as likely as each of them: 1 for the most likely one.
        ranks: Vec<usize>,
    },
    /// The hidden state of the prompt's last token after the final norm, where asked for.
    Embedding {
        /// [`EngineLimits::embedding_width`] values; not scaled.
        values: Vec<f32>,
    },
    /// More of an answer.
    Delta {
        /// Which of the `n` answers.
        choice: usize,
        /// Whole characters: the texts of the tokens, and at the end of an answer what an unfinished character left.
        text: String,
        /// The tokens that the text came from, each once and in order, whether logprobs were asked for or not. A token
        /// is held back while its text may be part of a stop string.
        tokens: Vec<TokenInfo>,
    },
    /// An answer has ended.
    Done {
        /// Which of the `n` answers.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// Which of the request's own stops ended it.
        matched: Option<Matched>,
    },
    /// All answers have ended; nothing follows.
    Finished {
        /// What it took.
        usage: Usage,
    },
    /// The request failed; nothing follows.
    Failed {
        /// What happened, fit for a client to read.
        message: String,
        /// The request's own grammar cannot be followed: it is to blame, not the engine.
        by_grammar: bool,
    },
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenInfo {
    /// The token.
    pub id: u32,
    /// Its bytes; part of a character, maybe.
    pub bytes: Vec<u8>,
    /// The text that it completes: none for a part of a character and for a special token that is not shown, less than
    /// its bytes where a stop string begins inside of it.
    pub text: String,
    /// Natural logarithm of its probability under the model, before anything of [`Sampling`] but among the tokens that
    /// the constraint allows, as vLLM's `raw_logprobs` are (0 when not asked for).
    pub logprob: f32,
    /// The most likely tokens at its place, best first, with their bytes and log-probabilities.
    pub top: Vec<(u32, Vec<u8>, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string or token did.
    Stop,
    /// `max_tokens` or the end of the context was reached.
    Length,
}

/// A stop of the request that ended an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Matched {
    /// One of its stop tokens.
    Token(u32),
    /// One of its stop strings.
    Text(String),
}

/// What a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of all answers, those that ended them included.
    pub completion_tokens: usize,
    /// Prompt tokens that were in the cache already.
    pub cached_tokens: usize,
    /// From submission to leaving the queue.
    pub queue: Duration,
    /// From leaving the queue to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Time to first token: from submission, queue included.
    pub ttft: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: EngineLimits = EngineLimits {
        context_tokens_max: 100,
        vocab: 50,
        n_max: 4,
        stop_strings_max: 4,
        stop_bytes_max: 8,
        stop_tokens_max: 4,
        logprobs_max: 20,
        logit_bias_max: 3,
        score_rows_max: 4,
        embedding_width: 8,
    };

    fn sampling(change: impl FnOnce(&mut Sampling)) -> Request {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        Request { prompt: vec![1], sampling, ..Request::default() }
    }

    fn request(change: impl FnOnce(&mut Request)) -> Request {
        let mut request = Request { prompt: vec![1], ..Request::default() };
        change(&mut request);
        request
    }

    #[test]
    fn every_field_is_checked() {
        let cases = [
            ("prompt", request(|r| r.prompt.clear())),
            ("prompt", request(|r| r.prompt = vec![0; 100])),
            ("prompt", request(|r| r.prompt = vec![50])),
            ("max_tokens", request(|r| r.max_tokens = Some(0))),
            ("min_tokens", request(|r| (r.min_tokens, r.max_tokens) = (3, Some(2)))),
            ("n", request(|r| r.n = 0)),
            ("n", request(|r| r.n = 5)),
            ("stop", request(|r| r.stop = vec![String::new()])),
            ("stop", request(|r| r.stop = vec!["123456789".into()])),
            ("stop", request(|r| r.stop = vec!["a".into(); 5])),
            ("stop_token_ids", request(|r| r.stop_tokens = vec![50])),
            ("stop_token_ids", request(|r| r.stop_tokens = vec![1; 5])),
            ("logprobs", request(|r| r.logprobs = Some(21))),
            ("prompt_logprobs", request(|r| r.prompt_logprobs = Some(21))),
            ("temperature", sampling(|s| s.temperature = -0.1)),
            ("temperature", sampling(|s| s.temperature = f32::NAN)),
            ("temperature", sampling(|s| s.temperature = f32::INFINITY)),
            ("top_p", sampling(|s| s.top_p = 1.1)),
            ("min_p", sampling(|s| s.min_p = -1.0)),
            ("typical_p", sampling(|s| s.typical_p = 2.0)),
            ("repetition_penalty", sampling(|s| s.repetition_penalty = 0.0)),
            ("presence_penalty", sampling(|s| s.presence_penalty = 3.0)),
            ("frequency_penalty", sampling(|s| s.frequency_penalty = -3.0)),
            ("logit_bias", sampling(|s| s.logit_bias = vec![(50, 0.0)])),
            ("logit_bias", sampling(|s| s.logit_bias = vec![(1, 101.0)])),
            ("logit_bias", sampling(|s| s.logit_bias = vec![(1, 0.0); 4])),
        ];
        for (field, request) in cases {
            let Err(e) = request.validate(&LIMITS) else { panic!("{field} was accepted") };
            assert_eq!(e.field, field, "{e}");
        }
    }

    #[test]
    fn an_answer_is_at_most_as_long_as_the_context_has_room() {
        for (asked, given) in [(None, 97), (Some(5), 5), (Some(1000), 97)] {
            let valid = request(|r| (r.prompt, r.max_tokens) = (vec![1, 2, 3], asked)).validate(&LIMITS);
            assert_eq!(valid.ok().and_then(|v| v.0.max_tokens), Some(given));
        }
    }
}

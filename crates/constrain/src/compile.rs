//! Rules made into automata over a model's tokens.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use oxseek_text::Tokenizer;

use crate::{AnswerRule, CallRules, Error, SCHEMA_BYTES_MAX, limits::parser_limits, urgency};

/// Stack of the thread that compiles a grammar: what is nested recurses.
const STACK_BYTES: usize = 64 << 20;

/// A model's tokens, ready for grammars.
pub struct Grammars {
    factory: Arc<ParserFactory>,
    tokenizer: Arc<Tokenizer>,
}

impl Grammars {
    /// `end` is the token that ends an answer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]
    pub fn new(tokenizer: &Arc<Tokenizer>, end: u32) -> Result<Self, Error> {
        let bad = |e: &dyn ToString| Error::Tokenizer(e.to_string());
        let control: Vec<u32> =
            tokenizer.added_tokens().filter_map(|text| tokenizer.token_id(text)).collect();
        let mut words: Vec<Vec<u8>> =
            (0..tokenizer.vocab_len() as u32).map(|id| tokenizer.token_bytes(id).to_vec()).collect();
        for id in control {
            // Control tokens are no text: only their numbers name them.
            words[id as usize].insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        let info = TokRxInfo::new(words.len() as u32, end);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let capabilities = InferenceCapabilities::default();
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&environment, capabilities, &slices).map_err(|e| bad(&e))?;
        *factory.limits_mut() = parser_limits();
        factory.quiet();
        Ok(Self { factory: Arc::new(factory), tokenizer: Arc::clone(tokenizer) })
    }

    /// A grammar of answers, of calls, or of either: the answer may then be one or the other.
    ///
    /// # Errors
    /// [`Error::Limit`] or [`Error::Grammar`]
    pub fn compile(&self, answer: Option<&AnswerRule>, calls: Option<&CallRules>) -> Result<Compiled, Error> {
        let start = match (answer.is_some(), calls.is_some()) {
            (true, true) => "start: @answer | calls",
            (true, false) => "start: @answer",
            _ => "start: calls",
        };
        self.build(start, answer, calls)
    }

    /// A grammar of what follows the token that begins calls.
    ///
    /// # Errors
    /// As [`Grammars::compile`].
    pub fn compile_rest(&self, calls: &CallRules) -> Result<Compiled, Error> {
        self.build("start: rest", None, Some(calls))
    }

    fn build(
        &self,
        start: &str,
        answer: Option<&AnswerRule>,
        calls: Option<&CallRules>,
    ) -> Result<Compiled, Error> {
        let (mut grammars, mut bytes_left) = (Vec::new(), SCHEMA_BYTES_MAX);
        let mut lark = format!("{start}\n");
        if let Some(calls) = calls {
            lark += &calls.lark(&self.tokenizer, &mut grammars, &mut bytes_left)?;
        }
        if let Some(answer) = answer {
            grammars.push(answer.grammar("answer", &mut bytes_left)?);
        }
        grammars.insert(0, GrammarWithLexer::from_lark(lark));
        let grammar = TopLevelGrammar { grammars, max_tokens: None };
        let factory = Arc::clone(&self.factory);
        let work = move || {
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            match matcher.get_error() {
                Some(e) => Err(Error::grammar(&e)),
                // The first mask finds what the bounds of a step refuse.
                None => matcher.compute_mask_or_eos().map(|_| matcher).map_err(|e| Error::grammar(&e)),
            }
        };
        beside(work).map(Compiled)
    }
}

/// Runs `work` on a thread of its own, which has the stack for it and leaves the cores to those that compute answers.
/// What panics there panics alone.
fn beside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let broken = || Error::Grammar("it cannot be compiled".into());
    let work = move || {
        urgency::lower();
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(broken()))
    };
    let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn(work);
    thread.map_err(|e| Error::Limit(e.to_string()))?.join().map_err(|_| broken())?
}

/// A grammar that answers can be held to.
pub struct Compiled(Matcher);

impl Compiled {
    /// One answer, from its beginning.
    pub fn follow(&self) -> Follower {
        Follower(self.0.clone())
    }
}

/// An answer that follows a grammar.
pub struct Follower(Matcher);

impl Follower {
    /// Writes which tokens may come next into `words`, one bit each; answers false when nothing may and the answer is
    /// complete.
    ///
    /// # Errors
    /// [`Error::Grammar`] when the grammar is too much work here.
    pub fn mask(&mut self, words: &mut [u32]) -> Result<bool, Error> {
        if self.0.is_stopped() && !self.0.is_error() {
            return Ok(false);
        }
        let mask = self.0.compute_mask().map_err(|e| Error::grammar(&e))?;
        for (to, from) in words.iter_mut().zip(mask.as_slice()) {
            *to = *from;
        }
        Ok(true)
    }

    /// The token was chosen.
    ///
    /// # Errors
    /// [`Error::Grammar`] when the grammar does not allow it.
    pub fn commit(&mut self, token: u32) -> Result<(), Error> {
        self.0.consume_token(token).map_err(|e| Error::grammar(&e))
    }

    /// The answer may end here.
    pub fn may_end(&mut self) -> bool {
        self.0.is_accepting().unwrap_or(false)
    }
}

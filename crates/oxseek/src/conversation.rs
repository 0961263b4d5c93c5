//! Messages to a prompt, a prompt to a streamed answer.

use std::time::Duration;

use oxseek_engine::{Event, Request, SubmitError, Ticket, Usage};
use oxseek_text::{ControlTokens, guard_messages};
use serde_json::{Map, Value, json};

use crate::{args::SamplingArgs, failure::Failure, open::Opened, terminal::AnswerWriter};

/// One message of a conversation.
pub fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Tokens of a conversation, and whether the answer begins inside the model's thinking.
pub fn chat_prompt(opened: &Opened, messages: &[Value], think: bool) -> Result<(Vec<u32>, bool), Failure> {
    let template = opened
        .template
        .as_ref()
        .ok_or_else(|| Failure::Usage("this model has no chat template: use `oxseek run --raw`".into()))?;
    let tokenizer = opened.engine.tokenizer();
    let mut extra = Map::new();
    extra.insert("thinking".into(), think.into());
    let failed = |e: oxseek_text::Error| Failure::Run(e.to_string());
    let rendered = template
        .render(&guard_messages(messages, tokenizer), None, true, &opened.bos, &opened.eos, &extra)
        .map_err(failed)?;
    let thinking = rendered.trim_end().ends_with("<think>");
    Ok((tokenizer.encode_rendered(&rendered).map_err(failed)?, thinking))
}

/// Tokens of plain text to continue.
pub fn text_prompt(opened: &Opened, text: &str) -> Result<Vec<u32>, Failure> {
    let tokenizer = opened.engine.tokenizer();
    // Who writes raw prompts writes the control tokens that they need; only the one that begins a text is added.
    let begins = text.starts_with(&opened.bos);
    let mut tokens: Vec<u32> = tokenizer.token_id(&opened.bos).filter(|_| !begins).into_iter().collect();
    tokens.extend(tokenizer.encode(text, ControlTokens::Parse).map_err(|e| Failure::Run(e.to_string()))?);
    Ok(tokens)
}

/// Hands a prompt to the engine.
pub fn submit(opened: &Opened, prompt: Vec<u32>, args: &SamplingArgs) -> Result<Ticket, Failure> {
    let mut sampling = opened.sampling.clone();
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
    sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
    sampling.min_p = args.min_p.unwrap_or(sampling.min_p);
    sampling.seed = args.seed;
    let request = Request { prompt, max_tokens: args.max_tokens, sampling, ..Request::default() };
    let valid = request
        .validate(opened.engine.limits())
        .map_err(|e| Failure::Usage(format!("{}: {}", e.field, e.message)))?;
    opened.engine.submit(valid).map_err(|e| match e {
        SubmitError::Busy | SubmitError::TenantBusy => Failure::Run("the engine is busy".into()),
        SubmitError::Stopped => Failure::Run("the engine has stopped".into()),
    })
}

/// Streams an answer to the terminal until it ends or Ctrl-C is pressed; dropping the ticket then cancels it.
pub async fn stream(mut ticket: Ticket, thinking: bool) -> Result<(String, Option<Usage>), Failure> {
    let mut writer = AnswerWriter::stdout(thinking);
    let mut answer = String::new();
    let mut usage = None;
    loop {
        let event = tokio::select! {
            event = ticket.next() => event,
            _ = tokio::signal::ctrl_c() => break,
        };
        match event {
            Some(Event::Delta { text, .. }) => {
                writer.write(&text)?;
                answer.push_str(&text);
            }
            Some(Event::Finished { usage: u, .. }) => usage = Some(u),
            Some(Event::Failed { message, .. }) => return Err(Failure::Run(message)),
            Some(
                Event::Done { .. }
                | Event::Progress { .. }
                | Event::PromptLogprobs { .. }
                | Event::Embedding { .. },
            ) => {}
            None => break,
        }
    }
    writer.finish()?;
    Ok((answer, usage))
}

/// `15 prompt + 120 answer tokens, first after 12 ms, 812 tokens/s`
pub fn describe(u: &Usage) -> String {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    format!(
        "{} prompt + {} answer tokens, first after {:.0} ms, {:.0} tokens/s",
        u.prompt_tokens,
        u.completion_tokens,
        u.ttft.as_secs_f64() * 1e3,
        rate(u.completion_tokens.saturating_sub(1), u.decode),
    )
}

/// The little runtime that the terminal commands wait on; the engine has its own thread.
pub fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}

//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use oxseek_constrain::CallRules;
use oxseek_engine::{Request, ValidRequest};
use oxseek_text::{TurnStart, guard_messages, guard_value};
use serde_json::{Value, json};

use super::{
    answer::{Answer, Form},
    body,
    constraint::Rules,
    fields::Fields,
    formats::{Format, refused},
    messages::{Messages, messages},
    parameters::{Streaming, check_model, either, generation, neutral, streaming},
    scores::prompt_logprobs,
    thinking::Thinking,
    tools::{Choice, Tools},
};
use crate::{
    caller::Caller,
    error::ApiError,
    state::{AppState, Model},
    traces::Operation,
};

/// Answers a conversation.
pub(crate) async fn chat_completions(
    State(state): State<AppState>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = state.model()?;
    let body = body::read(&headers, body).await?;
    let prepared = {
        let model = Arc::clone(&model);
        state.prepare(move || prepare(&model, &body)).await?
    };
    let ticket = caller.submit(&model, Operation::Chat, prepared.request)?;
    let form = Form::Chat { format: Arc::clone(&model.dialect.format), start: prepared.start };
    let answer = Answer::new(form, model.name.clone(), vec![ticket], prepared.n, prepared.logprobs);
    let answer = answer.with_prompt_logprobs(prepared.prompt_logprobs);
    answer.respond(prepared.streaming).await
}

struct Prepared {
    request: ValidRequest,
    n: usize,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    start: TurnStart,
    streaming: Streaming,
}

/// Reads a body without asking the engine.
pub(crate) fn check(model: &Model, body: &[u8]) -> Result<(), ApiError> {
    prepare(model, body).map(drop)
}

/// From a body to a request that the engine takes.
fn prepare(model: &Model, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let mut request = Request { sampling: model.sampling.clone(), ..Request::default() };
    generation(&mut fields, &mut request)?;
    request.max_tokens = either(&mut fields, "max_completion_tokens", "max_tokens", Fields::positive)?;
    request.logprobs = logprobs(&mut fields, model)?;
    let streaming = streaming(&mut fields)?;
    request.progress = streaming.progress;
    request.prompt_logprobs = prompt_logprobs(&mut fields, streaming)?;
    let conversation = Conversation::take(&mut fields, model)?;
    unsupported(&mut fields)?;
    neutral(&mut fields)?;
    fields.finish()?;
    let start = conversation.apply(model, &mut request)?;
    let (n, logprobs, prompt_logprobs) = (request.n, request.logprobs, request.prompt_logprobs);
    let named = |field| match field {
        "prompt" => "messages",
        "logprobs" => "top_logprobs",
        other => other,
    };
    let request =
        request.validate(model.engine.limits()).map_err(|e| ApiError::refused(named(e.field), &e))?;
    Ok(Prepared { request, n, logprobs, prompt_logprobs, start, streaming })
}

/// Messages, tools and thinking: what a chat says, whichever door it came through.
#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) messages: Messages,
    pub(crate) tools: Tools,
    pub(crate) thinking: Thinking,
    /// The form of the answer.
    pub(crate) format: Option<Format>,
}

impl Conversation {
    /// Takes what a prompt is made of.
    pub(crate) fn take(fields: &mut Fields, model: &Model) -> Result<Self, ApiError> {
        let mut messages = messages(fields, model.dialect.arguments)?;
        if fields.boolean("continue_final_message")?.unwrap_or(false) {
            if messages.list.last().is_none_or(|m| m["role"] != "assistant") {
                return Err(ApiError::invalid(
                    "continue_final_message",
                    "the last message is no assistant's",
                ));
            }
            messages.prefix = true;
        }
        // vLLM wants it to be false with the field before.
        if fields.boolean("add_generation_prompt")?.is_some_and(|add| add == messages.prefix) {
            let why = "contradicts the end of messages";
            return Err(ApiError::invalid("add_generation_prompt", why));
        }
        let tools = Tools::take(fields)?;
        let thinking = Thinking::take(fields, &model.dialect)?;
        let format = Format::take(fields)?;
        Ok(Self { messages, tools, thinking, format })
    }

    /// Makes the request's prompt, and bans what the tools forbid; answers what the turn begins with.
    pub(crate) fn apply(&self, model: &Model, request: &mut Request) -> Result<TurnStart, ApiError> {
        self.check_tools(model)?;
        let (prompt, thinking) = self.render(model)?;
        self.thinking.check(&model.dialect, thinking)?;
        request.prompt = prompt;
        if let Some(id) = model.dialect.format.calls_begin_id().filter(|_| self.tools.choice == Choice::None)
        {
            // -100 bans a token.
            request.sampling.logit_bias.retain(|(token, _)| *token != id);
            request.sampling.logit_bias.push((id, -100.0));
        }
        request.grammar = self.rules(model, thinking)?.into_grammar();
        Ok(TurnStart { thinking, calls: self.tools.callable(), ids: 0 })
    }

    /// What the answer is held to.
    fn rules(&self, model: &Model, thinking: bool) -> Result<Rules, ApiError> {
        let dialect = &model.dialect;
        let mut rules = dialect.rules(model);
        rules.thinking = thinking;
        rules.thinking_tokens_max = self.thinking.tokens_max;
        let forced = matches!(self.tools.choice, Choice::Required | Choice::Named(_));
        let held =
            self.tools.callable() && (!self.tools.parallel || self.tools.list.iter().any(|t| t.strict));
        let format = self.format.as_ref().filter(|_| !forced);
        if !(forced || held || format.is_some()) {
            return Ok(rules);
        }
        if thinking && rules.think_close.is_none() {
            let why = "needs a model whose closing think tag is one token, while it thinks";
            let param = format.map_or("tools", |f| f.param);
            return Err(ApiError::unsupported(param, why));
        }
        let grammars = dialect.grammars(model)?;
        let calls = self.tools.callable().then(|| self.call_rules(model, forced)).flatten();
        let compiled = match (format, &calls) {
            (None, Some(calls)) if !forced => {
                let why = "this model's calls do not begin with a token of their own";
                rules.behind =
                    Some(dialect.format.calls_begin_id().ok_or_else(|| ApiError::unsupported("tools", why))?);
                grammars.compile_rest(calls)
            }
            (format, calls) => grammars.compile(format.map(|f| &f.rule), calls.as_ref()),
        };
        rules.grammar = Some(compiled.map_err(|e| {
            let tools_alone = calls.as_ref().map(|c| grammars.compile(None, Some(c)).is_ok());
            let param =
                if tools_alone == Some(false) { "tools" } else { format.map_or("tools", |f| f.param) };
            refused(param, &e)
        })?);
        Ok(rules)
    }

    /// The calls that the turn may hold. Who must call keeps to the schemas; else strict tools do.
    fn call_rules(&self, model: &Model, forced: bool) -> Option<CallRules> {
        let chosen = |i: usize| !matches!(self.tools.choice, Choice::Named(n) if n != i);
        let tools = self.tools.list.iter().enumerate().filter(|(i, _)| chosen(*i)).map(|(_, tool)| {
            let schema =
                if tool.strict || forced { tool.parameters.clone() } else { json!({"type": "object"}) };
            (tool.name.clone(), schema)
        });
        let earlier =
            self.messages.list.iter().filter_map(|m| m["tool_calls"].as_array()).map(Vec::len).sum();
        let many = self.tools.parallel && !matches!(self.tools.choice, Choice::Named(_));
        Some(CallRules { style: model.dialect.format.calls()?, tools: tools.collect(), many, earlier })
    }

    fn check_tools(&self, model: &Model) -> Result<(), ApiError> {
        if !self.tools.list.is_empty() && model.dialect.format.calls().is_none() {
            let why = "this model's template and tokens show no way to call tools that this server knows";
            return Err(ApiError::unsupported("tools", why));
        }
        Ok(())
    }

    /// The prompt's tokens, and whether it ends inside of thinking.
    fn render(&self, model: &Model) -> Result<(Vec<u32>, bool), ApiError> {
        let no_template = "this model has no chat template; use /v1/completions";
        let template =
            model.template.as_ref().ok_or_else(|| ApiError::unsupported("messages", no_template))?;
        let tokenizer = model.engine.tokenizer();
        let mut messages = guard_messages(&self.messages.list, tokenizer);
        let prefix = self.messages.prefix.then(|| messages.pop()).flatten();
        let mut tools: Vec<Value> = self.tools.declared.clone();
        tools.iter_mut().for_each(|t| guard_value(t, tokenizer));
        if !tools.is_empty() && !model.dialect.declares_tools {
            declare(&mut messages, &model.dialect.declaration(&tools));
        }
        let tools = Value::from(tools);
        let shown = tools.as_array().is_some_and(|t| !t.is_empty()).then_some(&tools);
        let extra = &self.thinking.extra;
        let mut text = template.render(&messages, shown, true, &model.bos, &model.eos, extra)?;
        if let Some(prefix) = prefix {
            continue_answer(&mut text, &prefix);
        }
        let thinking = text.trim_end().ends_with("<think>")
            || text.rfind("<think>").is_some_and(|open| {
                self.messages.prefix && text.rfind("</think>").is_none_or(|close| close < open)
            });
        Ok((tokenizer.encode_rendered(&text)?, thinking))
    }
}

/// Puts the tools into the system message, which is made when there is none.
fn declare(messages: &mut Vec<Value>, declaration: &str) {
    match messages.iter_mut().find(|m| m["role"] == "system") {
        Some(system) => {
            let text = system["content"].as_str().unwrap_or_default();
            system["content"] = format!("{text}\n\n{declaration}").into();
        }
        None => messages.insert(0, json!({"role": "system", "content": declaration})),
    }
}

/// Appends the beginning of an answer to a prompt that ends where answers begin.
fn continue_answer(text: &mut String, message: &Value) {
    let content = message["content"].as_str().unwrap_or_default();
    if text.trim_end().ends_with("<think>") {
        *text += message["reasoning_content"].as_str().unwrap_or_default();
        // With an answer begun the thinking is over; without one it goes on.
        if !content.is_empty() {
            *text += "</think>";
        }
    }
    *text += content;
}

/// `logprobs` and `top_logprobs`.
fn logprobs(fields: &mut Fields, model: &Model) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs")?;
    let most = model.engine.limits().logprobs_max;
    match (wanted, top) {
        (_, Some(n)) if n > most => {
            Err(ApiError::invalid("top_logprobs", format!("{n} is more than {most}")))
        }
        (false, Some(1..)) => Err(ApiError::invalid("top_logprobs", "needs logprobs: true")),
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, _) => Ok(None),
    }
}

/// Parts of OpenAI's chat API that this server does not have. Values that ask for nothing are fine.
fn unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    fields.only("functions", &[json!([])])?;
    fields.only("function_call", &[json!("none"), json!("auto")])?;
    fields.only("modalities", &[json!(["text"])])?;
    fields.only("verbosity", &[json!("medium")])
}

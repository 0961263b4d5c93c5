//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use oxseek_engine::{Request, ValidRequest};
use serde_json::json;

use super::{
    answer::{Answer, Echo, Form},
    body,
    fields::Fields,
    formats::{Format, refused},
    parameters::{Streaming, check_model, either, generation, neutral, streaming},
    prompts::prompts,
    scores::prompt_logprobs,
};
use crate::{
    caller::Caller,
    error::ApiError,
    limits::PROMPTS_MAX,
    state::{AppState, Model},
    traces::Operation,
};

/// OpenAI's default of this route.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Continues texts.
pub(crate) async fn completions(
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
    let tokens = prepared.requests.iter().map(|r| r.tokens_max() as u64).sum();
    let tab = caller.open_tab(&model, Operation::TextCompletion, tokens)?;
    // One that does not find a place any more takes the others with it: their tickets are dropped.
    let submit = |r| caller.submit_on(&tab, &model, r).map_err(|e| caller.refuse(e));
    let tickets: Result<Vec<_>, _> = prepared.requests.into_iter().map(submit).collect();
    drop(tab);
    let form = Form::Text { echo: prepared.echo };
    let answer = Answer::new(form, model.name.clone(), tickets?, prepared.n, prepared.logprobs);
    let answer = answer.with_prompt_logprobs(prepared.prompt_logprobs);
    answer.respond(prepared.streaming).await
}

struct Prepared {
    requests: Vec<ValidRequest>,
    n: usize,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// What goes before the answers, one per prompt; none without `echo`.
    echo: Vec<Echo>,
    streaming: Streaming,
}

/// Reads a body without asking the engine.
pub(crate) fn check(model: &Model, body: &[u8]) -> Result<(), ApiError> {
    prepare(model, body).map(drop)
}

/// From a body to requests that the engine takes, one per prompt.
fn prepare(model: &Model, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let mut request = Request { sampling: model.sampling.clone(), ..Request::default() };
    generation(&mut fields, &mut request)?;
    let asked = either(&mut fields, "max_tokens", "max_completion_tokens", Fields::positive)?;
    request.max_tokens = Some(asked.unwrap_or(MAX_TOKENS_DEFAULT));
    request.logprobs = fields.count("logprobs")?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    fields.only("best_of", &[json!(request.n)])?;
    let suffix = fields.string("suffix")?.filter(|s| !s.is_empty());
    let format = Format::take(&mut fields)?;
    let streaming = streaming(&mut fields)?;
    request.progress = streaming.progress;
    let prompt_logprobs = prompt_logprobs(&mut fields, streaming)?;
    if echo && suffix.is_some() && request.logprobs.is_some() {
        return Err(ApiError::unsupported("logprobs", "together with echo and suffix is not supported"));
    }
    request.prompt_logprobs = prompt_logprobs.max(request.logprobs.filter(|_| echo));
    let prompts = prompts(&mut fields, "prompt", PROMPTS_MAX)?;
    neutral(&mut fields)?;
    fields.finish()?;
    if let Some(Format { rule, param }) = &format {
        let mut rules = model.dialect.rules(model);
        let compiled = model.dialect.grammars(model)?.compile(Some(rule), None);
        rules.grammar = Some(compiled.map_err(|e| refused(param, &e))?);
        request.grammar = rules.into_grammar();
    }
    let (n, logprobs) = (request.n, request.logprobs);
    let (mut requests, mut echoes) = (Vec::new(), Vec::new());
    for p in prompts {
        let text = echo.then(|| p.text(model));
        let begin = p.begin(model, suffix.is_some());
        let prompt = p.tokens(model, "prompt", suffix.as_deref())?;
        let first = prompt.first().map(|&id| model.engine.tokenizer().token_bytes(id).to_vec());
        echoes.extend(text.map(|text| Echo {
            text,
            first: first.unwrap_or_default(),
            is_first_hidden: begin.is_some(),
        }));
        let request = Request { prompt, ..request.clone() };
        requests.push(request.validate(model.engine.limits())?);
    }
    Ok(Prepared { requests, n, logprobs, prompt_logprobs, echo: echoes, streaming })
}

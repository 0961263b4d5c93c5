//! From the engine's events to OpenAI's JSON, in one piece or as server-sent events.

use std::{
    collections::VecDeque,
    convert::Infallible,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{
    Stream, StreamExt,
    stream::{BoxStream, SelectAll, unfold},
};
use oxseek_engine::{Event, FinishReason, Matched, Ticket, TokenInfo, Usage};
use oxseek_text::{Turn, TurnFormat, TurnPart, TurnStart};
use serde_json::{Map, Value, json};

use super::{parameters::Streaming, scores::Scores};
use crate::error::ApiError;

/// Which of the two routes answers.
pub(crate) enum Form {
    /// `/v1/chat/completions`: the model's way to write a turn, and what each begins with.
    Chat { format: Arc<TurnFormat>, start: TurnStart },
    /// `/v1/completions`; prompts to put before the answers, or none.
    Text { echo: Vec<Echo> },
}

/// A prompt that goes before its answers.
pub(crate) struct Echo {
    pub(crate) text: String,
    /// The bytes of its first token, which has no log-probability.
    pub(crate) first: Vec<u8>,
    /// The first token is not in the text: it was put before it.
    pub(crate) is_first_hidden: bool,
}

/// Answers on their way out: `n` of them for each ticket.
pub(crate) struct Answer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    n: usize,
    /// Tell log-probabilities: of the tokens and of this many of the most likely ones.
    logprobs: Option<usize>,
    /// The same of the prompts, in vLLM's shape.
    prompt_logprobs: Option<usize>,
    /// What is known about the tokens of the prompts, one per ticket.
    scores: Vec<Scores>,
    events: SelectAll<BoxStream<'static, (usize, Option<Event>)>>,
    choices: Vec<ChoiceState>,
    usage: Usage,
    reasoning_tokens: usize,
    open: usize,
}

/// What was sent of an answer so far.
struct ChoiceState {
    /// None for a completion, whose text is as the model wrote it.
    turn: Option<Turn>,
    begun: bool,
    /// Characters of text so far, for `text_offset`.
    characters: usize,
}

/// A piece of an answer.
enum Piece {
    Text {
        choice: usize,
        parts: Vec<TurnPart>,
        tokens: Vec<TokenInfo>,
    },
    Done {
        choice: usize,
        end: End,
    },
    /// Tokens of the prompt: computed, all, and found in the cache.
    Progress {
        done: usize,
        total: usize,
        cached: usize,
    },
}

/// How an answer ended.
#[derive(Debug, Clone)]
struct End {
    reason: &'static str,
    /// vLLM's `stop_reason`: which of the request's own stops it was.
    matched: Value,
}

impl Answer {
    pub(crate) fn new(
        form: Form,
        model: String,
        tickets: Vec<Ticket>,
        n: usize,
        logprobs: Option<usize>,
    ) -> Self {
        let count = tickets.len() * n;
        let random = RandomState::new();
        let choice = |i: usize| {
            let turn = match &form {
                Form::Chat { format, start } => {
                    let start = TurnStart { ids: random.hash_one(i), ..*start };
                    Some(Turn::new(Arc::clone(format), start))
                }
                Form::Text { .. } => None,
            };
            ChoiceState { turn, begun: false, characters: 0 }
        };
        let prefix = if matches!(form, Form::Chat { .. }) { "chatcmpl" } else { "cmpl" };
        Self {
            id: format!("{prefix}-{:016x}", random.hash_one("id")),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model,
            n,
            logprobs,
            prompt_logprobs: None,
            scores: tickets.iter().map(|_| Scores::default()).collect(),
            open: tickets.len(),
            events: tickets.into_iter().enumerate().map(|(prompt, t)| events(prompt, t)).collect(),
            choices: (0..count).map(choice).collect(),
            usage: Usage::default(),
            reasoning_tokens: 0,
            form,
        }
    }

    /// Tells log-probabilities of the prompts too, and of `count` of the most likely tokens.
    pub(crate) fn with_prompt_logprobs(self, count: Option<usize>) -> Self {
        Self { prompt_logprobs: count, ..self }
    }

    /// The response to the client.
    pub(crate) async fn respond(self, streaming: Streaming) -> Result<Response, ApiError> {
        if !streaming.stream {
            return self.collect().await.map(|v| Json(v).into_response());
        }
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            // nginx would hold the stream back.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        let body = Body::from_stream(self.chunks(streaming.include_usage));
        Ok((headers, body).into_response())
    }

    /// The pieces that the next event leads to; None after the last.
    async fn next(&mut self) -> Option<Result<Vec<Piece>, ApiError>> {
        while self.open > 0 {
            // Every stream ends with an event that is handled below, so this is never None.
            let (prompt, event) = self.events.next().await?;
            match event {
                Some(Event::Delta { choice, text, tokens }) => {
                    let choice = prompt * self.n + choice;
                    let parts = self.choices[choice].split(&text, &tokens);
                    if !parts.is_empty() || (self.logprobs.is_some() && !tokens.is_empty()) {
                        return Some(Ok(vec![Piece::Text { choice, parts, tokens }]));
                    }
                }
                Some(Event::Done { choice, reason, matched }) => {
                    let choice = prompt * self.n + choice;
                    let mut pieces = Vec::new();
                    let (parts, called) = self.end_turn(choice);
                    if !parts.is_empty() {
                        pieces.push(Piece::Text { choice, parts, tokens: Vec::new() });
                    }
                    let reason = match reason {
                        FinishReason::Stop if called => "tool_calls",
                        FinishReason::Stop => "stop",
                        FinishReason::Length => "length",
                    };
                    let matched = match matched {
                        None => Value::Null,
                        Some(Matched::Token(id)) => id.into(),
                        Some(Matched::Text(text)) => text.into(),
                    };
                    pieces.push(Piece::Done { choice, end: End { reason, matched } });
                    return Some(Ok(pieces));
                }
                Some(Event::Finished { usage }) => {
                    self.usage.prompt_tokens += usage.prompt_tokens;
                    self.usage.completion_tokens += usage.completion_tokens;
                    self.usage.cached_tokens += usage.cached_tokens;
                    self.open -= 1;
                }
                // Nobody asked for these.
                Some(Event::Progress { done, total, cached }) => {
                    return Some(Ok(vec![Piece::Progress { done, total, cached }]));
                }
                Some(Event::Embedding { .. }) => {}
                Some(Event::PromptLogprobs { tokens, ranks, .. }) => self.scores[prompt].add(tokens, ranks),
                Some(Event::Failed { message, by_grammar: true }) => {
                    return Some(Err(ApiError::grammar(message)));
                }
                Some(Event::Failed { message, .. }) => return Some(Err(ApiError::failed(message))),
                None => {
                    return Some(Err(ApiError::failed(
                        "the answer was cut: its reader stood still for too long",
                    )));
                }
            }
        }
        None
    }

    /// Everything in one piece.
    async fn collect(mut self) -> Result<Value, ApiError> {
        let mut whole: Vec<Whole> = self.choices.iter().map(|_| Whole::default()).collect();
        while let Some(pieces) = self.next().await {
            for piece in pieces? {
                match piece {
                    Piece::Text { choice, parts, tokens } => whole[choice].add(parts, tokens),
                    Piece::Done { choice, end } => whole[choice].end = Some(end),
                    Piece::Progress { .. } => {}
                }
            }
        }
        let choices: Vec<Value> =
            whole.into_iter().enumerate().map(|(i, w)| self.whole_choice(i, w)).collect();
        let object = if self.is_chat() { "chat.completion" } else { "text_completion" };
        let mut answer = self.frame(object, &choices);
        answer["usage"] = self.usage_json();
        if let Some(count) = self.prompt_logprobs.filter(|_| self.is_chat()) {
            answer["prompt_logprobs"] =
                self.scores.iter().map(|s| s.to_json(count)).next().unwrap_or_default();
        }
        Ok(answer)
    }

    fn whole_choice(&mut self, index: usize, whole: Whole) -> Value {
        let logprobs = self.whole_logprobs(index, &whole.tokens);
        let mut choice = json!({"index": index, "logprobs": logprobs});
        if let Some(end) = &whole.end {
            choice["finish_reason"] = end.reason.into();
            choice["stop_reason"] = end.matched.clone();
        }
        if self.is_chat() {
            choice["message"] = whole.message();
        } else {
            choice["text"] = (self.echo_text(index).to_string() + &whole.content).into();
            if let Some(count) = self.prompt_logprobs {
                choice["prompt_logprobs"] = self.scores[index / self.n].to_json(count);
            }
        }
        choice
    }

    /// `logprobs` of a whole choice, those of an echoed prompt first.
    fn whole_logprobs(&mut self, index: usize, tokens: &[TokenInfo]) -> Value {
        if self.logprobs.is_none() {
            return Value::Null;
        }
        if self.is_chat() {
            return chat_logprobs(tokens);
        }
        let mut rows = self.echo_rows(index);
        rows.extend(self.text_rows(index, tokens));
        text_logprobs(rows)
    }

    /// Server-sent events: `data: {...}` each, `data: [DONE]` at the end. An error ends the stream without it.
    fn chunks(self, include_usage: bool) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        struct Sending {
            answer: Answer,
            ready: VecDeque<Bytes>,
            ended: bool,
            include_usage: bool,
        }
        let sending = Sending { answer: self, ready: VecDeque::new(), ended: false, include_usage };
        unfold(sending, |mut s| async move {
            while s.ready.is_empty() {
                if s.ended {
                    return None;
                }
                match s.answer.next().await {
                    Some(Ok(pieces)) => {
                        for piece in pieces {
                            s.answer.piece_chunks(piece, s.include_usage, &mut s.ready);
                        }
                    }
                    Some(Err(e)) => {
                        s.ended = true;
                        s.ready.push_back(sse(&e.to_json()));
                    }
                    None => {
                        s.ended = true;
                        if s.include_usage {
                            let mut last = s.answer.frame(s.answer.chunk_object(), &[]);
                            last["usage"] = s.answer.usage_json();
                            s.ready.push_back(sse(&last));
                        }
                        s.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    }
                }
            }
            s.ready.pop_front().map(|bytes| (Ok(bytes), s))
        })
    }

    fn piece_chunks(&mut self, piece: Piece, include_usage: bool, out: &mut VecDeque<Bytes>) {
        let index = match &piece {
            Piece::Text { choice, .. } | Piece::Done { choice, .. } => *choice,
            Piece::Progress { done, total, cached } => {
                let mut chunk = self.frame(self.chunk_object(), &[]);
                chunk["prompt_progress"] = json!({"total": total, "cache": cached, "processed": done});
                return out.push_back(sse(&chunk));
            }
        };
        let begins = !std::mem::replace(&mut self.choices[index].begun, true);
        let mut payloads: Vec<(Value, Value, Option<End>)> = Vec::new();
        if begins && self.is_chat() {
            payloads.push((json!({"role": "assistant", "content": "", "refusal": null}), Value::Null, None));
        } else if begins {
            let rows = if self.logprobs.is_some() { self.echo_rows(index) } else { Vec::new() };
            let logprobs = if rows.is_empty() { Value::Null } else { text_logprobs(rows) };
            if !(self.echo_text(index).is_empty() && logprobs.is_null()) {
                payloads.push((self.echo_text(index).into(), logprobs, None));
            }
        }
        match piece {
            Piece::Text { parts, tokens, .. } => {
                let mut deltas = self.deltas(parts);
                if deltas.is_empty() {
                    deltas.push(self.no_delta());
                }
                let mut logprobs = self.piece_logprobs(index, &tokens);
                let with_logprobs = |delta| (delta, logprobs.take(), None);
                payloads.extend(deltas.into_iter().map(with_logprobs));
            }
            Piece::Done { end, .. } => payloads.push((self.no_delta(), Value::Null, Some(end))),
            Piece::Progress { .. } => {}
        }
        for (payload, logprobs, end) in payloads {
            let reason = end.as_ref().map(|e| e.reason);
            let mut choice = json!({"index": index, "logprobs": logprobs, "finish_reason": reason});
            if let Some(end) = end {
                choice["stop_reason"] = end.matched;
            }
            choice[if self.is_chat() { "delta" } else { "text" }] = payload;
            let mut chunk = self.frame(self.chunk_object(), &[choice]);
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            out.push_back(sse(&chunk));
        }
    }

    /// A `delta` of a chat chunk per part, or the text of a completion chunk.
    fn deltas(&self, parts: Vec<TurnPart>) -> Vec<Value> {
        if !self.is_chat() {
            return parts.into_iter().map(content).map(Value::from).collect();
        }
        parts.into_iter().filter_map(delta).collect()
    }

    fn no_delta(&self) -> Value {
        if self.is_chat() { json!({}) } else { "".into() }
    }

    /// Ends a choice's turn: what it held back, and whether it called tools.
    fn end_turn(&mut self, choice: usize) -> (Vec<TurnPart>, bool) {
        let mut parts = Vec::new();
        let Some(turn) = &mut self.choices[choice].turn else { return (parts, false) };
        turn.finish(&mut parts);
        self.reasoning_tokens += turn.reasoning_tokens();
        (parts, turn.calls() > 0)
    }

    fn usage_json(&self) -> Value {
        let usage = &self.usage;
        let mut json = json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        });
        if self.is_chat() {
            json["completion_tokens_details"] = json!({"reasoning_tokens": self.reasoning_tokens});
        }
        json
    }

    fn frame(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("oxseek-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    /// `logprobs` of a piece of a choice.
    fn piece_logprobs(&mut self, index: usize, tokens: &[TokenInfo]) -> Value {
        if self.logprobs.is_none() || tokens.is_empty() {
            Value::Null
        } else if self.is_chat() {
            chat_logprobs(tokens)
        } else {
            text_logprobs(self.text_rows(index, tokens))
        }
    }

    fn text_rows(&mut self, index: usize, tokens: &[TokenInfo]) -> Vec<TextRow> {
        let row = |token: &TokenInfo| TextRow {
            offset: self.choices[index].advance(&token.bytes),
            text: text(&token.bytes),
            logprob: Some(token.logprob),
            top: top_by_text(token, usize::MAX),
        };
        tokens.iter().map(row).collect()
    }

    /// The tokens of an echoed prompt; none without `echo`.
    fn echo_rows(&mut self, index: usize) -> Vec<TextRow> {
        let prompt = index / self.n;
        let Form::Text { echo } = &self.form else { return Vec::new() };
        let Some(Echo { first, is_first_hidden, .. }) = echo.get(prompt) else { return Vec::new() };
        let (choice, count) = (&mut self.choices[index], self.logprobs.unwrap_or_default());
        let shown: &[u8] = if *is_first_hidden { &[] } else { first };
        let offset = choice.advance(shown);
        let first = TextRow { offset, text: text(first), logprob: None, top: Value::Null };
        let rows = self.scores[prompt].tokens().iter().map(|token| TextRow {
            offset: choice.advance(&token.bytes),
            text: text(&token.bytes),
            logprob: Some(token.logprob),
            top: top_by_text(token, count),
        });
        [first].into_iter().chain(rows).collect()
    }

    fn is_chat(&self) -> bool {
        matches!(self.form, Form::Chat { .. })
    }

    fn chunk_object(&self) -> &'static str {
        if self.is_chat() { "chat.completion.chunk" } else { "text_completion" }
    }

    fn echo_text(&self, index: usize) -> &str {
        match &self.form {
            Form::Text { echo } => echo.get(index / self.n).map_or("", |e| &e.text),
            Form::Chat { .. } => "",
        }
    }
}

impl ChoiceState {
    /// Where a token's text begins, in characters of the text so far; the text is then longer by it.
    fn advance(&mut self, bytes: &[u8]) -> usize {
        let at = self.characters;
        self.characters += text(bytes).chars().count();
        at
    }

    /// The parts of a chat's turn, or a completion's text.
    fn split(&mut self, text: &str, tokens: &[TokenInfo]) -> Vec<TurnPart> {
        let mut parts = Vec::new();
        match &mut self.turn {
            None if text.is_empty() => {}
            None => parts.push(TurnPart::Content(text.into())),
            Some(turn) => {
                let mut taken = 0;
                for token in tokens {
                    turn.push(token.id, &token.text, &mut parts);
                    taken += token.text.len();
                }
                turn.push_text(text.get(taken..).unwrap_or_default(), &mut parts);
            }
        }
        parts
    }
}

/// An answer that is collected.
#[derive(Default)]
struct Whole {
    content: String,
    reasoning: String,
    calls: Vec<Call>,
    tokens: Vec<TokenInfo>,
    end: Option<End>,
}

struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Whole {
    fn add(&mut self, parts: Vec<TurnPart>, tokens: Vec<TokenInfo>) {
        for part in parts {
            match part {
                TurnPart::Content(text) => self.content.push_str(&text),
                TurnPart::Reasoning(text) => self.reasoning.push_str(&text),
                TurnPart::CallBegin { id, name, .. } => {
                    self.calls.push(Call { id, name, arguments: String::new() });
                }
                TurnPart::Arguments { text, .. } => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(&text);
                    }
                }
                TurnPart::CallEnd { .. } => {}
            }
        }
        self.tokens.extend(tokens);
    }

    /// `message` of a chat answer.
    fn message(self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.content, "refusal": null});
        if !self.reasoning.is_empty() {
            message["reasoning"] = self.reasoning.as_str().into();
            message["reasoning_content"] = self.reasoning.into();
        }
        if !self.calls.is_empty() {
            if self.content.is_empty() {
                message["content"] = Value::Null;
            }
            let call = |c: Call| {
                let function = json!({"name": c.name, "arguments": c.arguments});
                json!({"id": c.id, "type": "function", "function": function})
            };
            message["tool_calls"] = self.calls.into_iter().map(call).collect();
        }
        message
    }
}

/// `delta` of a chat chunk. Thinking goes by both of the names that clients look for.
fn delta(part: TurnPart) -> Option<Value> {
    let call = |index: usize, rest: Value| {
        let mut call = rest;
        call["index"] = index.into();
        Some(json!({"tool_calls": [call]}))
    };
    match part {
        TurnPart::Content(text) => Some(json!({"content": text})),
        TurnPart::Reasoning(text) => Some(json!({"reasoning_content": text, "reasoning": text})),
        TurnPart::CallBegin { index, id, name } => {
            call(index, json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}}))
        }
        TurnPart::Arguments { index, text } => call(index, json!({"function": {"arguments": text}})),
        TurnPart::CallEnd { .. } => None,
    }
}

fn content(part: TurnPart) -> String {
    match part {
        TurnPart::Content(text) => text,
        _ => String::new(),
    }
}

/// A ticket's events, with None where the engine cut it.
fn events(prompt: usize, ticket: Ticket) -> BoxStream<'static, (usize, Option<Event>)> {
    unfold(Some(ticket), move |ticket| async move {
        let mut ticket = ticket?;
        let event = ticket.next().await;
        let last = matches!(event, None | Some(Event::Finished { .. } | Event::Failed { .. }));
        Some(((prompt, event), (!last).then_some(ticket)))
    })
    .boxed()
}

fn sse(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn chat_logprob(token: &TokenInfo) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({"token": text(bytes), "logprob": logprob, "bytes": bytes});
    let mut entry = one(&token.bytes, token.logprob);
    entry["top_logprobs"] = token.top.iter().map(|(_, bytes, logprob)| one(bytes, *logprob)).collect();
    entry
}

fn chat_logprobs(tokens: &[TokenInfo]) -> Value {
    json!({"content": tokens.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null})
}

/// A token in the `logprobs` of a completion.
struct TextRow {
    /// Where its text begins, in characters.
    offset: usize,
    text: String,
    /// None for the first token of a prompt.
    logprob: Option<f32>,
    top: Value,
}

/// `logprobs` of a completion.
fn text_logprobs(rows: Vec<TextRow>) -> Value {
    json!({
        "tokens": rows.iter().map(|r| r.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": rows.iter().map(|r| r.logprob).collect::<Vec<_>>(),
        "text_offset": rows.iter().map(|r| r.offset).collect::<Vec<_>>(),
        "top_logprobs": rows.into_iter().map(|r| r.top).collect::<Vec<_>>(),
    })
}

/// The `count` most likely tokens and the chosen one, by their text.
fn top_by_text(token: &TokenInfo, count: usize) -> Value {
    let mut map = Map::new();
    let chosen = (text(&token.bytes), token.logprob);
    // Different bytes may show as the same text: the most likely one of them stays.
    for (t, logprob) in token.top.iter().take(count).map(|(_, bytes, l)| (text(bytes), *l)).chain([chosen]) {
        map.entry(t).or_insert_with(|| logprob.into());
    }
    map.into()
}

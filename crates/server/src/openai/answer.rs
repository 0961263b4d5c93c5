//! From the engine's events to OpenAI's JSON, in one piece or as server-sent events.

use std::{
    collections::VecDeque,
    convert::Infallible,
    hash::{BuildHasher, RandomState},
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
use oxseek_engine::{Event, FinishReason, Ticket, TokenInfo, Usage};
use oxseek_text::{Part, ReasoningSplit};
use serde_json::{Map, Value, json};

use super::parameters::Streaming;
use crate::error::ApiError;

/// Which of the two routes answers.
pub(crate) enum Form {
    /// `/v1/chat/completions`; `thinking` when the prompt ends inside of the model's thinking.
    Chat { thinking: bool },
    /// `/v1/completions`; texts to put before the answers, one per prompt or none.
    Text { echo: Vec<String> },
}

/// Answers on their way out: `n` of them for each ticket.
pub(crate) struct Answer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    n: usize,
    logprobs: bool,
    events: SelectAll<BoxStream<'static, (usize, Option<Event>)>>,
    choices: Vec<ChoiceState>,
    usage: Usage,
    open: usize,
}

/// What was sent of an answer so far.
struct ChoiceState {
    reasoning: ReasoningSplit,
    begun: bool,
    /// Characters of text so far, for `text_offset`.
    characters: usize,
}

/// A piece of an answer.
enum Piece {
    Text { choice: usize, parts: Vec<(Part, String)>, tokens: Vec<TokenInfo> },
    Done { choice: usize, reason: FinishReason },
}

impl Answer {
    pub(crate) fn new(form: Form, model: String, tickets: Vec<Ticket>, n: usize, logprobs: bool) -> Self {
        let thinking = matches!(form, Form::Chat { thinking: true });
        let count = tickets.len() * n;
        let choice = || ChoiceState { reasoning: ReasoningSplit::new(thinking), begun: false, characters: 0 };
        let prefix = if matches!(form, Form::Chat { .. }) { "chatcmpl" } else { "cmpl" };
        Self {
            id: format!("{prefix}-{:016x}", RandomState::new().hash_one(0u8)),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model,
            n,
            logprobs,
            open: tickets.len(),
            events: tickets.into_iter().enumerate().map(|(prompt, t)| events(prompt, t)).collect(),
            choices: (0..count).map(|_| choice()).collect(),
            usage: Usage::default(),
            form,
        }
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
                    let parts = self.choices[choice].split(&self.form, &text);
                    if !parts.is_empty() || (self.logprobs && !tokens.is_empty()) {
                        return Some(Ok(vec![Piece::Text { choice, parts, tokens }]));
                    }
                }
                Some(Event::Done { choice, reason, .. }) => {
                    let choice = prompt * self.n + choice;
                    let mut pieces = Vec::new();
                    if let Some(rest) = self.choices[choice].reasoning.finish() {
                        pieces.push(Piece::Text { choice, parts: vec![rest], tokens: Vec::new() });
                    }
                    pieces.push(Piece::Done { choice, reason });
                    return Some(Ok(pieces));
                }
                Some(Event::Finished { usage }) => {
                    self.usage.prompt_tokens += usage.prompt_tokens;
                    self.usage.completion_tokens += usage.completion_tokens;
                    self.usage.cached_tokens += usage.cached_tokens;
                    self.open -= 1;
                }
                // Nobody asked for these.
                Some(Event::Progress { .. } | Event::PromptLogprobs { .. }) => {}
                Some(Event::Failed { message }) => return Some(Err(ApiError::failed(message))),
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
                    Piece::Done { choice, reason } => whole[choice].reason = Some(reason),
                }
            }
        }
        let choices: Vec<Value> =
            whole.into_iter().enumerate().map(|(i, w)| self.whole_choice(i, w)).collect();
        let object = if self.is_chat() { "chat.completion" } else { "text_completion" };
        let mut answer = self.frame(object, &choices);
        answer["usage"] = usage_json(&self.usage);
        Ok(answer)
    }

    fn whole_choice(&mut self, index: usize, whole: Whole) -> Value {
        let logprobs = if self.logprobs { self.logprobs_json(index, &whole.tokens) } else { Value::Null };
        let mut choice =
            json!({"index": index, "logprobs": logprobs, "finish_reason": whole.reason.map(reason_json)});
        if self.is_chat() {
            let mut message = json!({"role": "assistant", "content": whole.content, "refusal": null});
            if !whole.reasoning.is_empty() {
                message["reasoning_content"] = whole.reasoning.into();
            }
            choice["message"] = message;
        } else {
            choice["text"] = (self.echo(index).to_string() + &whole.content).into();
        }
        choice
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
                            last["usage"] = usage_json(&s.answer.usage);
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
        };
        let begins = !std::mem::replace(&mut self.choices[index].begun, true);
        let mut payloads: Vec<(Value, Vec<TokenInfo>, Option<FinishReason>)> = Vec::new();
        if begins && self.is_chat() {
            payloads.push((json!({"role": "assistant", "content": "", "refusal": null}), Vec::new(), None));
        } else if begins && !self.echo(index).is_empty() {
            payloads.push((self.echo(index).into(), Vec::new(), None));
        }
        match piece {
            Piece::Text { parts, tokens, .. } => payloads.push((self.delta(parts), tokens, None)),
            Piece::Done { reason, .. } => payloads.push((self.delta(Vec::new()), Vec::new(), Some(reason))),
        }
        for (payload, tokens, reason) in payloads {
            let logprobs = if self.logprobs && !tokens.is_empty() {
                self.logprobs_json(index, &tokens)
            } else {
                Value::Null
            };
            let mut choice =
                json!({"index": index, "logprobs": logprobs, "finish_reason": reason.map(reason_json)});
            choice[if self.is_chat() { "delta" } else { "text" }] = payload;
            let mut chunk = self.frame(self.chunk_object(), &[choice]);
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            out.push_back(sse(&chunk));
        }
    }

    /// `delta` of a chat chunk, or the text of a completion chunk.
    fn delta(&self, parts: Vec<(Part, String)>) -> Value {
        if !self.is_chat() {
            return parts.into_iter().map(|(_, text)| text).collect::<String>().into();
        }
        let mut delta = Map::new();
        for (part, text) in parts {
            let key = if part == Part::Reasoning { "reasoning_content" } else { "content" };
            delta.insert(key.into(), text.into());
        }
        delta.into()
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

    fn logprobs_json(&mut self, index: usize, tokens: &[TokenInfo]) -> Value {
        if self.is_chat() {
            return json!({"content": tokens.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null});
        }
        let texts: Vec<String> = tokens.iter().map(|t| text(&t.bytes)).collect();
        let offsets: Vec<usize> = texts
            .iter()
            .map(|t| {
                let at = self.choices[index].characters;
                self.choices[index].characters += t.chars().count();
                at
            })
            .collect();
        json!({
            "tokens": texts,
            "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top_by_text).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }

    fn is_chat(&self) -> bool {
        matches!(self.form, Form::Chat { .. })
    }

    fn chunk_object(&self) -> &'static str {
        if self.is_chat() { "chat.completion.chunk" } else { "text_completion" }
    }

    fn echo(&self, index: usize) -> &str {
        match &self.form {
            Form::Text { echo } => echo.get(index / self.n).map_or("", String::as_str),
            Form::Chat { .. } => "",
        }
    }
}

impl ChoiceState {
    /// Thinking and answer of a chat; a completion's text is as the model wrote it.
    fn split(&mut self, form: &Form, text: &str) -> Vec<(Part, String)> {
        match form {
            Form::Chat { .. } => self.reasoning.push(text),
            Form::Text { .. } if text.is_empty() => Vec::new(),
            Form::Text { .. } => vec![(Part::Content, text.to_string())],
        }
    }
}

/// An answer that is collected.
#[derive(Default)]
struct Whole {
    content: String,
    reasoning: String,
    tokens: Vec<TokenInfo>,
    reason: Option<FinishReason>,
}

impl Whole {
    fn add(&mut self, parts: Vec<(Part, String)>, tokens: Vec<TokenInfo>) {
        for (part, text) in parts {
            match part {
                Part::Content => self.content.push_str(&text),
                Part::Reasoning => self.reasoning.push_str(&text),
            }
        }
        self.tokens.extend(tokens);
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

fn reason_json(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
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

/// The most likely tokens and the chosen one, by their text.
fn top_by_text(token: &TokenInfo) -> Value {
    let mut map = Map::new();
    let chosen = (text(&token.bytes), token.logprob);
    // Different bytes may show as the same text: the most likely one of them stays.
    for (t, logprob) in token.top.iter().map(|(_, bytes, l)| (text(bytes), *l)).chain([chosen]) {
        map.entry(t).or_insert_with(|| logprob.into());
    }
    map.into()
}

//! Chunks of a chat answer as pieces: what other doors make their own events of.

use std::collections::VecDeque;

use serde_json::Value;

use super::Events;
use crate::error::ApiError;

/// A piece of an answer. Pieces of one kind that follow each other belong together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// More of the thinking.
    Reasoning(String),
    /// More of the answer, with the entries of its tokens' log-probabilities.
    Text(String, Vec<Value>),
    /// A tool is called.
    Call { id: String, name: String },
    /// More of the last call's arguments.
    Arguments(String),
    /// The answer has ended.
    Ended(Ended),
    /// It failed; nothing follows.
    Failed(Value),
}

/// How an answer ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Ended {
    /// OpenAI's `finish_reason`.
    pub(crate) reason: String,
    /// The stop string that ended it.
    pub(crate) stop: Option<String>,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) reasoning_tokens: u64,
}

/// The pieces of an answer of one choice, asked for with its usage.
pub(crate) struct Pieces {
    events: Events,
    ready: VecDeque<Piece>,
    /// Kept until the usage has come.
    ended: Ended,
    over: bool,
}

impl Pieces {
    pub(crate) fn new(events: Events) -> Self {
        Self { events, ready: VecDeque::new(), ended: Ended::default(), over: false }
    }

    /// The next piece; None after [`Piece::Ended`] or [`Piece::Failed`].
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(piece);
            }
            if self.over {
                return None;
            }
            match self.events.next().await.as_deref() {
                Some("[DONE]") => {
                    self.over = true;
                    return Some(Piece::Ended(std::mem::take(&mut self.ended)));
                }
                Some(payload) => self.take(payload),
                // A stream without its end was cut.
                None => self.fail(ApiError::internal().to_json()["error"].take()),
            }
        }
    }

    fn fail(&mut self, error: Value) {
        self.over = true;
        self.ready.push_back(Piece::Failed(error));
    }

    fn take(&mut self, payload: &str) {
        let mut chunk: Value = serde_json::from_str(payload).unwrap_or_default();
        if !chunk["error"].is_null() {
            return self.fail(chunk["error"].take());
        }
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        let usage = &chunk["usage"];
        if usage.is_object() {
            self.ended.prompt_tokens = count(&usage["prompt_tokens"]);
            self.ended.completion_tokens = count(&usage["completion_tokens"]);
            self.ended.cached_tokens = count(&usage["prompt_tokens_details"]["cached_tokens"]);
            self.ended.reasoning_tokens = count(&usage["completion_tokens_details"]["reasoning_tokens"]);
        }
        let Some(choice) = chunk.pointer_mut("/choices/0") else { return };
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.ended.reason = reason.into();
            self.ended.stop = choice["stop_reason"].as_str().map(str::to_string);
        }
        let logprobs = match choice["logprobs"]["content"].take() {
            Value::Array(list) => list,
            _ => Vec::new(),
        };
        self.delta(&choice["delta"], logprobs);
    }

    fn delta(&mut self, delta: &Value, logprobs: Vec<Value>) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let reasoning = text(&delta["reasoning_content"]);
        if !reasoning.is_empty() {
            self.ready.push_back(Piece::Reasoning(reasoning));
        }
        let content = text(&delta["content"]);
        // Log-probabilities of thinking and of calls are not part of any text.
        let of_text = if content.is_empty() { Vec::new() } else { logprobs };
        if !content.is_empty() {
            self.ready.push_back(Piece::Text(content, of_text));
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            if call["id"].is_string() {
                self.ready
                    .push_back(Piece::Call { id: text(&call["id"]), name: text(&call["function"]["name"]) });
            }
            let arguments = text(&call["function"]["arguments"]);
            if !arguments.is_empty() {
                self.ready.push_back(Piece::Arguments(arguments));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use axum::body::{Body, Bytes};
    use futures_util::stream;
    use serde_json::json;

    use super::*;

    /// The events of a body with these chunks, `[DONE]` last if `whole`.
    pub(crate) fn events(chunks: &[Value], whole: bool) -> Events {
        let mut frames: Vec<String> = chunks.iter().map(|c| format!("data: {c}\n\n")).collect();
        if whole {
            frames.push("data: [DONE]\n\n".into());
        }
        let frames: Vec<Result<Bytes, std::convert::Infallible>> =
            frames.into_iter().map(|f| Ok(Bytes::from(f))).collect();
        Events::new(Body::from_stream(stream::iter(frames)))
    }

    pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap_or_else(|e| panic!("{e}")).block_on(future)
    }

    fn pieces(chunks: &[Value], whole: bool) -> Vec<Piece> {
        let mut pieces = Pieces::new(events(chunks, whole));
        block_on(async {
            let mut all = Vec::new();
            while let Some(piece) = pieces.next().await {
                all.push(piece);
            }
            all
        })
    }

    fn delta(delta: &Value) -> Value {
        json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null, "logprobs": null}]})
    }

    #[test]
    fn chunks_become_pieces_and_the_end_has_the_usage() {
        let chunks = [
            delta(&json!({"role": "assistant", "content": ""})),
            delta(&json!({"reasoning_content": "Hm", "reasoning": "Hm"})),
            delta(&json!({"content": "So"})),
            delta(&json!({"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                "function": {"name": "f", "arguments": ""}}]})),
            delta(&json!({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "END"}]}),
            json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 2}}}),
        ];
        let ended = Ended {
            reason: "stop".into(),
            stop: Some("END".into()),
            prompt_tokens: 7,
            cached_tokens: 3,
            completion_tokens: 5,
            reasoning_tokens: 2,
        };
        let want = [
            Piece::Reasoning("Hm".into()),
            Piece::Text("So".into(), Vec::new()),
            Piece::Call { id: "call_1".into(), name: "f".into() },
            Piece::Arguments("{}".into()),
            Piece::Ended(ended),
        ];
        assert_eq!(pieces(&chunks, true), want);
    }

    #[test]
    fn an_answer_that_fails_or_is_cut_says_so_once() {
        let error = json!({"message": "no", "type": "server_error"});
        let failed = [delta(&json!({"content": "a"})), json!({"error": error})];
        assert_eq!(pieces(&failed, false), [Piece::Text("a".into(), Vec::new()), Piece::Failed(error)]);
        let cut = pieces(&[delta(&json!({"content": "a"}))], false);
        assert!(matches!(cut.as_slice(), [Piece::Text(..), Piece::Failed(_)]), "{cut:?}");
    }
}

//! From pieces of an answer to the events of `/v1/responses`, in OpenAI's order, and to the response itself.

use std::hash::{BuildHasher, RandomState};

use serde_json::{Map, Value, json};

use crate::relay::{Ended, Piece};

/// A response while it is written. Every event goes into a list that its owner empties.
pub(crate) struct Output {
    /// All fields but `output`, `status`, `usage` and what else the end decides.
    response: Value,
    items: Vec<Value>,
    open: Option<Kind>,
    sequence: u64,
    events: Vec<Value>,
}

/// What the item that is open holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call,
}

/// An id that nobody can guess: 128 bits of the standard library's random keys.
pub(crate) fn new_id(prefix: &str) -> String {
    let digits = || RandomState::new().hash_one(prefix);
    format!("{prefix}_{:016x}{:016x}", digits(), digits())
}

impl Output {
    /// A response that has not begun; `echo` holds the fields that repeat the request.
    pub(crate) fn new(id: &str, created: u64, model: &str, echo: Map<String, Value>) -> Self {
        let mut response = json!({
            "id": id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": null,
            "incomplete_details": null,
            "model": model,
            "output": [],
            "service_tier": "default",
            "truncation": "disabled",
            "usage": null,
        });
        for (name, value) in echo {
            response[name] = value;
        }
        Self { response, items: Vec::new(), open: None, sequence: 0, events: Vec::new() }
    }

    /// The events since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// The response as it stands.
    pub(crate) fn response(&self) -> Value {
        let mut response = self.response.clone();
        response["output"] = self.items.clone().into();
        response
    }

    /// Tells that it begins.
    pub(crate) fn begin(&mut self) {
        self.state("response.created");
        self.state("response.in_progress");
    }

    /// Adds a piece.
    pub(crate) fn push(&mut self, piece: Piece) {
        match piece {
            Piece::Reasoning(text) => {
                self.enter(Kind::Reasoning);
                self.append(&["content", "0", "text"], &text);
                self.event("response.reasoning_text.delta", json!({"content_index": 0, "delta": text}));
            }
            Piece::Text(text, logprobs) => {
                self.enter(Kind::Message);
                self.append(&["content", "0", "text"], &text);
                if let Some(Value::Array(all)) = self.item().pointer_mut("/content/0/logprobs") {
                    all.extend(logprobs.iter().cloned());
                }
                let delta = json!({"content_index": 0, "delta": text, "logprobs": logprobs});
                self.event("response.output_text.delta", delta);
            }
            Piece::Call { id, name } => {
                self.leave("completed");
                let item = json!({"type": "function_call", "id": new_id("fc"), "call_id": id, "name": name,
                    "arguments": "", "status": "in_progress"});
                self.add(Kind::Call, item);
            }
            Piece::Arguments(text) => {
                if self.open == Some(Kind::Call) {
                    self.append(&["arguments"], &text);
                    self.event("response.function_call_arguments.delta", json!({"delta": text}));
                }
            }
            Piece::Ended(ended) => self.end(&ended),
            Piece::Failed(error) => self.fail(&error),
        }
    }

    /// It was cancelled.
    pub(crate) fn cancel(&mut self) {
        self.leave("incomplete");
        self.response["status"] = "cancelled".into();
    }

    fn end(&mut self, ended: &Ended) {
        let cut = ended.reason == "length";
        self.leave(if cut { "incomplete" } else { "completed" });
        self.response["usage"] = json!({
            "input_tokens": ended.prompt_tokens,
            "input_tokens_details": {"cached_tokens": ended.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": ended.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
            "total_tokens": ended.prompt_tokens + ended.completion_tokens,
        });
        if cut {
            self.response["status"] = "incomplete".into();
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            self.state("response.incomplete");
        } else {
            self.response["status"] = "completed".into();
            self.state("response.completed");
        }
    }

    fn fail(&mut self, error: &Value) {
        self.leave("incomplete");
        self.response["status"] = "failed".into();
        self.response["error"] = json!({"code": "server_error", "message": error["message"]});
        self.state("response.failed");
    }

    /// Makes sure that an item of this kind is open.
    fn enter(&mut self, kind: Kind) {
        if self.open == Some(kind) {
            return;
        }
        self.leave("completed");
        let (item, part) = if kind == Kind::Reasoning {
            let part = json!({"type": "reasoning_text", "text": ""});
            (
                json!({"type": "reasoning", "id": new_id("rs"), "summary": [], "content": [], "status": "in_progress"}),
                part,
            )
        } else {
            let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
            let id = new_id("msg");
            (
                json!({"type": "message", "id": id, "role": "assistant", "content": [], "status": "in_progress"}),
                part,
            )
        };
        self.add(kind, item);
        self.event("response.content_part.added", json!({"content_index": 0, "part": part}));
        self.item()["content"] = json!([part]);
    }

    fn add(&mut self, kind: Kind, item: Value) {
        self.items.push(item);
        self.open = Some(kind);
        let index = self.items.len() - 1;
        self.emit("response.output_item.added", json!({"output_index": index, "item": self.items[index]}));
    }

    /// Ends the item that is open.
    fn leave(&mut self, status: &str) {
        let Some(kind) = self.open.take() else { return };
        let index = self.items.len() - 1;
        let item = self.item().clone();
        let part = &item["content"][0];
        match kind {
            Kind::Reasoning => {
                self.event("response.reasoning_text.done", json!({"content_index": 0, "text": part["text"]}));
            }
            Kind::Message => {
                let text = json!({"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]});
                self.event("response.output_text.done", text);
            }
            Kind::Call => {
                let call = json!({"name": item["name"], "arguments": item["arguments"]});
                self.event("response.function_call_arguments.done", call);
            }
        }
        if kind != Kind::Call {
            self.event("response.content_part.done", json!({"content_index": 0, "part": part}));
        }
        self.item()["status"] = status.into();
        let item = self.item().clone();
        self.emit("response.output_item.done", json!({"output_index": index, "item": item}));
    }

    /// The last item; items exist wherever this is called.
    fn item(&mut self) -> &mut Value {
        if self.items.is_empty() {
            self.items.push(json!({}));
        }
        let last = self.items.len() - 1;
        &mut self.items[last]
    }

    fn append(&mut self, path: &[&str], text: &str) {
        if let Some(Value::String(whole)) = self.item().pointer_mut(&format!("/{}", path.join("/"))) {
            whole.push_str(text);
        }
    }

    /// An event of the last item.
    fn event(&mut self, kind: &str, mut fields: Value) {
        fields["item_id"] = self.item()["id"].clone();
        fields["output_index"] = (self.items.len() - 1).into();
        self.emit(kind, fields);
    }

    /// An event that carries the response.
    fn state(&mut self, kind: &str) {
        let response = self.response();
        self.emit(kind, json!({"response": response}));
    }

    fn emit(&mut self, kind: &str, mut fields: Value) {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.events.push(fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(pieces: Vec<Piece>) -> (Vec<Value>, Value) {
        let echo = json!({"store": true}).as_object().cloned().unwrap_or_default();
        let mut output = Output::new("resp_1", 7, "m", echo);
        output.begin();
        pieces.into_iter().for_each(|p| output.push(p));
        (output.take_events(), output.response())
    }

    fn ended(reason: &str) -> Piece {
        Piece::Ended(Ended {
            reason: reason.into(),
            prompt_tokens: 3,
            completion_tokens: 2,
            ..Ended::default()
        })
    }

    fn kinds(events: &[Value]) -> Vec<&str> {
        events.iter().filter_map(|e| e["type"].as_str()).map(|k| k.trim_start_matches("response.")).collect()
    }

    #[test]
    fn events_come_in_openais_order() {
        let (events, response) = output(vec![
            Piece::Reasoning("H".into()),
            Piece::Reasoning("m".into()),
            Piece::Text("So".into(), Vec::new()),
            Piece::Call { id: "call_1".into(), name: "f".into() },
            Piece::Arguments("{\"a\":".into()),
            Piece::Arguments("1}".into()),
            Piece::Call { id: "call_2".into(), name: "g".into() },
            ended("tool_calls"),
        ]);
        assert_eq!(
            kinds(&events),
            [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.done",
                "output_item.done",
                "completed",
            ]
        );
        for (i, e) in events.iter().enumerate() {
            assert_eq!(e["sequence_number"], i, "{e}");
        }
        let items = response["output"].as_array().cloned().unwrap_or_default();
        assert_eq!(items[0]["content"], json!([{"type": "reasoning_text", "text": "Hm"}]));
        assert_eq!(items[1]["content"][0]["text"], "So");
        assert_eq!(items[2]["arguments"], "{\"a\":1}");
        assert_eq!((&items[3]["name"], &items[3]["call_id"]), (&json!("g"), &json!("call_2")));
        assert!(items.iter().all(|i| i["status"] == "completed"), "{items:?}");
        assert_eq!(
            (&response["status"], &response["usage"]["total_tokens"]),
            (&json!("completed"), &json!(5))
        );
        // The events alone tell the whole response.
        assert_eq!(events.last().map(|e| &e["response"]), Some(&response));
        let done =
            events.iter().filter(|e| e["type"] == "response.output_item.done").map(|e| e["item"].clone());
        assert_eq!(done.collect::<Vec<_>>(), items);
    }

    #[test]
    fn a_cut_answer_is_incomplete_and_a_failed_one_failed() {
        let (events, response) = output(vec![Piece::Text("So".into(), Vec::new()), ended("length")]);
        assert_eq!(kinds(&events).last(), Some(&"incomplete"));
        assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
        assert_eq!(
            (&response["status"], &response["output"][0]["status"]),
            (&json!("incomplete"), &json!("incomplete"))
        );
        let (events, response) = output(vec![Piece::Failed(json!({"message": "no"}))]);
        assert_eq!(kinds(&events).last(), Some(&"failed"));
        assert_eq!((&response["status"], &response["error"]["message"]), (&json!("failed"), &json!("no")));
    }
}

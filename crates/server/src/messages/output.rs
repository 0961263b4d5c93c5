//! From pieces of an answer to the events of Anthropic's `/v1/messages`, and to the message itself.

use serde_json::{Value, json};

use crate::{
    relay::{Ended, Piece},
    responses::new_id,
};

/// A message while it is written. Every event goes into a list that its owner empties.
pub(crate) struct Output {
    message: Value,
    blocks: Vec<Value>,
    open: Option<Kind>,
    /// Arguments of the call that is open, as far as they were written.
    arguments: String,
    events: Vec<Value>,
}

/// What the block that is open holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    Call,
}

impl Output {
    pub(crate) fn new(model: &str) -> Self {
        let message = json!({
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        });
        Self { message, blocks: Vec::new(), open: None, arguments: String::new(), events: Vec::new() }
    }

    /// The events since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// The message as it stands.
    pub(crate) fn message(&self) -> Value {
        let mut message = self.message.clone();
        message["content"] = self.blocks.clone().into();
        message
    }

    /// Tells that it begins. How many tokens went in is known at the end only.
    pub(crate) fn begin(&mut self) {
        let message = self.message();
        self.events.push(json!({"type": "message_start", "message": message}));
    }

    /// Adds a piece.
    pub(crate) fn push(&mut self, piece: Piece) {
        match piece {
            Piece::Reasoning(text) => {
                self.enter(Kind::Thinking, || json!({"type": "thinking", "thinking": "", "signature": ""}));
                self.append("thinking", &text);
                self.delta(&json!({"type": "thinking_delta", "thinking": text}));
            }
            Piece::Text(text, _) => {
                self.enter(Kind::Text, || json!({"type": "text", "text": ""}));
                self.append("text", &text);
                self.delta(&json!({"type": "text_delta", "text": text}));
            }
            Piece::Call { id, name } => {
                self.leave();
                self.enter(Kind::Call, || json!({"type": "tool_use", "id": id, "name": name, "input": {}}));
            }
            Piece::Arguments(text) => {
                if self.open == Some(Kind::Call) {
                    self.arguments += &text;
                    self.delta(&json!({"type": "input_json_delta", "partial_json": text}));
                }
            }
            Piece::Ended(ended) => self.end(&ended),
            Piece::Failed(error) => {
                self.leave();
                self.events.push(
                    json!({"type": "error", "error": {"type": "api_error", "message": error["message"]}}),
                );
            }
        }
    }

    fn end(&mut self, ended: &Ended) {
        self.leave();
        let reason = match (ended.reason.as_str(), &ended.stop) {
            ("length", _) => "max_tokens",
            ("tool_calls", _) => "tool_use",
            (_, Some(_)) => "stop_sequence",
            _ => "end_turn",
        };
        let stop = (reason == "stop_sequence").then(|| ended.stop.clone());
        // What was in the cache is counted apart.
        let usage = json!({
            "input_tokens": ended.prompt_tokens - ended.cached_tokens.min(ended.prompt_tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": ended.cached_tokens,
            "output_tokens": ended.completion_tokens,
        });
        self.message["stop_reason"] = reason.into();
        self.message["stop_sequence"] = json!(stop);
        self.message["usage"] = usage.clone();
        let delta = json!({"stop_reason": reason, "stop_sequence": stop});
        self.events.push(json!({"type": "message_delta", "delta": delta, "usage": usage}));
        self.events.push(json!({"type": "message_stop"}));
    }

    /// Makes sure that a block of this kind is open.
    fn enter(&mut self, kind: Kind, block: impl FnOnce() -> Value) {
        if self.open == Some(kind) {
            return;
        }
        self.leave();
        let block = block();
        let index = self.blocks.len();
        self.events.push(json!({"type": "content_block_start", "index": index, "content_block": block}));
        self.blocks.push(block);
        self.open = Some(kind);
    }

    /// Ends the block that is open.
    fn leave(&mut self) {
        let Some(kind) = self.open.take() else { return };
        if kind == Kind::Thinking {
            self.delta(&json!({"type": "signature_delta", "signature": ""}));
        }
        if kind == Kind::Call {
            let arguments = std::mem::take(&mut self.arguments);
            // What the model cut or spoilt is kept as the text that it is.
            let input = serde_json::from_str::<Value>(&arguments).ok().filter(Value::is_object);
            let input = input
                .unwrap_or_else(|| if arguments.is_empty() { json!({}) } else { json!({"": arguments}) });
            if let Some(block) = self.blocks.last_mut() {
                block["input"] = input;
            }
        }
        self.events.push(json!({"type": "content_block_stop", "index": self.blocks.len() - 1}));
    }

    fn append(&mut self, name: &str, text: &str) {
        if let Some(Value::String(whole)) = self.blocks.last_mut().and_then(|b| b.get_mut(name)) {
            whole.push_str(text);
        }
    }

    fn delta(&mut self, delta: &Value) {
        let index = self.blocks.len() - 1;
        self.events.push(json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(pieces: Vec<Piece>) -> (Vec<Value>, Value) {
        let mut output = Output::new("m");
        output.begin();
        pieces.into_iter().for_each(|p| output.push(p));
        (output.take_events(), output.message())
    }

    fn ended(reason: &str, stop: Option<&str>) -> Piece {
        Piece::Ended(Ended {
            reason: reason.into(),
            stop: stop.map(str::to_string),
            prompt_tokens: 7,
            cached_tokens: 3,
            completion_tokens: 2,
            ..Ended::default()
        })
    }

    #[test]
    fn events_come_in_anthropics_order() {
        let (events, message) = output(vec![
            Piece::Reasoning("Hm".into()),
            Piece::Text("So".into(), Vec::new()),
            Piece::Call { id: "call_1".into(), name: "f".into() },
            Piece::Arguments("{\"a\":".into()),
            Piece::Arguments("1}".into()),
            Piece::Call { id: "call_2".into(), name: "g".into() },
            ended("tool_calls", None),
        ]);
        let names: Vec<String> = events
            .iter()
            .map(|e| match e["delta"]["type"].as_str() {
                Some(delta) => format!("{delta} {}", e["index"]),
                None => format!("{} {}", e["type"].as_str().unwrap_or_default(), e["index"]),
            })
            .collect();
        assert_eq!(
            names,
            [
                "message_start null",
                "content_block_start 0",
                "thinking_delta 0",
                "signature_delta 0",
                "content_block_stop 0",
                "content_block_start 1",
                "text_delta 1",
                "content_block_stop 1",
                "content_block_start 2",
                "input_json_delta 2",
                "input_json_delta 2",
                "content_block_stop 2",
                "content_block_start 3",
                "content_block_stop 3",
                "message_delta null",
                "message_stop null",
            ]
        );
        assert_eq!(
            message["content"],
            json!([
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "So"},
                {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
            ])
        );
        assert_eq!(message["stop_reason"], "tool_use");
        let usage = &message["usage"];
        assert_eq!((&usage["input_tokens"], &usage["cache_read_input_tokens"]), (&json!(4), &json!(3)));
    }

    #[test]
    fn the_end_tells_why() {
        for (reason, stop, want) in [
            ("stop", None, json!(["end_turn", null])),
            ("stop", Some("END"), json!(["stop_sequence", "END"])),
            ("length", None, json!(["max_tokens", null])),
        ] {
            let (_, message) = output(vec![Piece::Text("a".into(), Vec::new()), ended(reason, stop)]);
            assert_eq!(json!([message["stop_reason"], message["stop_sequence"]]), want);
        }
        let (events, _) = output(vec![Piece::Failed(json!({"message": "no"}))]);
        assert_eq!(
            events.last(),
            Some(&json!({"type": "error", "error": {"type": "api_error", "message": "no"}}))
        );
    }
}

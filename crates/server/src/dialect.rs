//! How a model talks: what its template reads and how it writes its turns.

use std::{
    fmt::Write,
    sync::{Arc, OnceLock},
};

use oxseek_constrain::{Error, Grammars};
use oxseek_text::{CallStyle, ChatTemplate, Tokenizer, TurnFormat};

use crate::{
    error::ApiError,
    openai::{constraint::Rules, messages::ArgumentsForm},
    state::Model,
};

/// What is known of a model's way to talk, found out once.
pub struct Dialect {
    pub(crate) format: Arc<TurnFormat>,
    /// How the template wants the arguments of earlier calls.
    pub(crate) arguments: ArgumentsForm,
    /// The template shows tools to the model by itself.
    pub(crate) declares_tools: bool,
    /// The template opens and closes thinking as it is asked to.
    pub(crate) thinking_switch: bool,
    /// Made for the first request that needs it.
    grammars: OnceLock<Result<Grammars, Error>>,
}

impl Dialect {
    /// What template and tokenizer speak of.
    pub fn new(template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Self {
        let source = template.map_or("", ChatTemplate::source);
        Self {
            format: Arc::new(TurnFormat::detect(template.map(ChatTemplate::source), tokenizer)),
            arguments: ArgumentsForm::of(source),
            declares_tools: source.contains("tools"),
            thinking_switch: source.contains("thinking"),
            grammars: OnceLock::new(),
        }
    }

    /// The model's tokens, ready for grammars.
    pub(crate) fn grammars(&self, model: &Model) -> Result<&Grammars, ApiError> {
        let make = || {
            let tokenizer = model.engine.tokenizer();
            let no_end = || Error::Tokenizer("no token ends its answers".into());
            let end = tokenizer.token_id(&model.eos).or(tokenizer.eos_id()).ok_or_else(no_end)?;
            Grammars::new(tokenizer, end)
        };
        let made = self.grammars.get_or_init(make);
        made.as_ref().map_err(|e| ApiError::unsupported("response_format", e.to_string()))
    }

    /// Rules that hold nothing yet.
    pub(crate) fn rules(&self, model: &Model) -> Rules {
        let tokenizer = model.engine.tokenizer();
        Rules {
            think_open: self.format.think_open_id(),
            think_close: self.format.think_close_id(),
            thinking: false,
            thinking_tokens_max: None,
            end: tokenizer.token_id(&model.eos).or(tokenizer.eos_id()),
            grammar: None,
            behind: None,
            vocab: model.engine.limits().vocab as u32,
        }
    }

    /// How tools are shown to a model whose template does not, in its own way to call them.
    pub(crate) fn declaration(&self, tools: &[serde_json::Value]) -> String {
        let mut text = String::from("## Tools\nYou have access to the following tools:\n");
        for tool in tools {
            let _ = write!(text, "\n{}\n", tool["function"]);
        }
        text += "\nTo call tools, write nothing else than this, with arguments that are valid for the parameters:\n";
        text += match self.format.calls() {
            Some(CallStyle::Fenced) => {
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```\
                 <｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            }
            Some(CallStyle::Plain) => {
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>\
                 <｜tool▁calls▁end｜>"
            }
            Some(CallStyle::Kimi) => {
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>\
                 ARGUMENTS<|tool_call_end|><|tool_calls_section_end|>"
            }
            Some(CallStyle::Dsml) => {
                "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"NAME\">\n<｜DSML｜parameter name=\"ARGUMENT\" \
                 string=\"true|false\">VALUE</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
            }
            None => "",
        };
        text
    }
}

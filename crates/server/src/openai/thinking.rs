//! Whether the model thinks before it answers, and for how long.

use serde_json::{Map, Value};

use super::fields::{Fields, wrong};
use crate::{dialect::Dialect, error::ApiError};

/// What a request says about thinking.
#[derive(Debug, Default)]
pub(crate) struct Thinking {
    /// None leaves it to the template.
    pub(crate) wanted: Option<bool>,
    /// Most tokens of it; then it is closed.
    pub(crate) tokens_max: Option<usize>,
    /// The template's own variables.
    pub(crate) extra: Map<String, Value>,
}

impl Thinking {
    /// `thinking` (true, or DeepSeek's object with `type`), `enable_thinking`, `reasoning_effort`,
    /// `chat_template_kwargs` and `thinking_token_budget`. What contradicts each other is refused.
    pub(crate) fn take(fields: &mut Fields, dialect: &Dialect) -> Result<Self, ApiError> {
        let mut extra = fields.object("chat_template_kwargs")?.unwrap_or_default();
        let mut thinking = Self { tokens_max: fields.count("thinking_token_budget")?, ..Self::default() };
        for name in ["thinking", "enable_thinking"] {
            if let Some(value) = extra.get(name) {
                let place = format!("chat_template_kwargs.{name}");
                let value = value.as_bool().ok_or_else(|| wrong(&place, "true or false", value))?;
                thinking.want(value, &place)?;
            }
        }
        match fields.take("thinking") {
            None => {}
            Some(Value::Bool(value)) => thinking.want(value, "thinking")?,
            Some(object) => thinking.object(object)?,
        }
        if let Some(value) = fields.boolean("enable_thinking")? {
            thinking.want(value, "enable_thinking")?;
        }
        if let Some(effort) = fields.string("reasoning_effort")? {
            let wanted = match effort.as_str() {
                "none" => false,
                "minimal" | "low" | "medium" | "high" | "xhigh" | "max" => true,
                _ => {
                    let why = "must be none, minimal, low, medium, high, xhigh or max";
                    return Err(ApiError::invalid("reasoning_effort", why));
                }
            };
            thinking.want(wanted, "reasoning_effort")?;
            extra.entry("reasoning_effort").or_insert(effort.into());
        }
        if let Some(wanted) = thinking.wanted {
            // DeepSeek-V3.1 asks for it by the first name, others by the second; a template takes what it knows.
            extra.insert("thinking".into(), wanted.into());
            extra.insert("enable_thinking".into(), wanted.into());
        }
        if thinking.tokens_max.is_some() && dialect.format.think_close_id().is_none() {
            let why = "needs a model whose closing think tag is one token";
            return Err(ApiError::unsupported("thinking_token_budget", why));
        }
        Ok(Self { extra, ..thinking })
    }

    /// `{"type": "enabled", "budget_tokens": 100}`.
    fn object(&mut self, value: Value) -> Result<(), ApiError> {
        let mut fields = Fields::nested(value, "thinking")?;
        match fields.string("type")?.as_deref() {
            Some("enabled") => self.want(true, "thinking.type")?,
            Some("disabled") => self.want(false, "thinking.type")?,
            Some("auto" | "adaptive") => {}
            _ => return Err(ApiError::invalid("thinking.type", "must be enabled, disabled or auto")),
        }
        self.tokens_max = fields.count("budget_tokens")?.or(self.tokens_max);
        fields.finish()
    }

    fn want(&mut self, value: bool, place: &str) -> Result<(), ApiError> {
        if self.wanted.is_some_and(|wanted| wanted != value) {
            return Err(ApiError::invalid(
                place,
                "contradicts what the request says elsewhere about thinking",
            ));
        }
        self.wanted = Some(value);
        Ok(())
    }

    /// Refuses a wish that the model cannot follow; `thinks` when the prompt ends inside of thinking.
    pub(crate) fn check(&self, dialect: &Dialect, thinks: bool) -> Result<(), ApiError> {
        match self.wanted {
            Some(wanted) if wanted != thinks && !dialect.thinking_switch => {
                let why = "this model's chat template cannot switch thinking on or off";
                Err(ApiError::unsupported("thinking", why))
            }
            _ => Ok(()),
        }
    }
}

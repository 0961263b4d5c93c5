//! OpenAI's API: from JSON to engine requests and back.

mod answer;
pub(crate) mod body;
pub(crate) mod capabilities;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod constraint;
mod depth;
pub(crate) mod embeddings;
pub(crate) mod fields;
mod formats;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod parameters;
mod prompts;
mod scores;
mod thinking;
pub(crate) mod tools;

//! OpenAI's API: from JSON to engine requests and back.

mod answer;
pub(crate) mod body;
pub(crate) mod chat;
pub(crate) mod completions;
mod depth;
pub(crate) mod fields;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod parameters;
mod thinking;
pub(crate) mod tools;

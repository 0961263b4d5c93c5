//! OpenAI's API: from JSON to engine requests and back.

mod answer;
mod body;
pub(crate) mod chat;
pub(crate) mod completions;
mod depth;
mod fields;
pub(crate) mod messages;
pub(crate) mod models;
mod parameters;
mod thinking;
pub(crate) mod tools;

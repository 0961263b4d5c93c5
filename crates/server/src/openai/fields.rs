//! The fields of a JSON object, each taken once and by its type. What is left over is unknown.
//!
//! Parsers can be watched: what they take is what `/openapi.json` says they take, so the two cannot disagree.

use std::cell::RefCell;

use serde_json::{Map, Value};

use crate::{error::ApiError, json};

thread_local! {
    static TAKEN: RefCell<Option<Vec<Taken>>> = const { RefCell::new(None) };
}

/// A field that a parser took, or would have taken if it had been there.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Taken {
    /// Like `messages[2].role`.
    pub(crate) path: String,
    pub(crate) kind: Kind,
}

/// What a parser takes a field as.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// The parser looks at it itself.
    Any,
    Boolean,
    Number,
    /// A whole number of 0 or more.
    Count,
    /// A whole number.
    Whole,
    Text,
    List,
    Object,
    /// One of these, and no other value.
    Only(Vec<Value>),
}

/// Runs a parser and tells what it took.
pub(crate) fn watch<T>(parse: impl FnOnce() -> T) -> (T, Vec<Taken>) {
    TAKEN.set(Some(Vec::new()));
    let parsed = parse();
    (parsed, TAKEN.take().unwrap_or_default())
}

/// Fields that are not taken yet. An absent field and `null` are the same thing.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where the object is: empty for the body, else like `messages[2].`.
    path: String,
}

impl Fields {
    /// The body of a request.
    pub(crate) fn from_body(body: &[u8]) -> Result<Self, ApiError> {
        match json::parse(body).map_err(|e| ApiError::json("body", e))? {
            Value::Object(map) => Ok(Self { map, path: String::new() }),
            other => Err(ApiError::body(format!("the body must be a JSON object, found {}", kind(&other)))),
        }
    }

    /// An object inside of another one.
    pub(crate) fn nested(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path: format!("{path}.") }),
            other => Err(wrong(path, "an object", &other)),
        }
    }

    /// A field of any type.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.take_as(name, || Kind::Any)
    }

    fn take_as(&mut self, name: &str, kind: impl FnOnce() -> Kind) -> Option<Value> {
        TAKEN.with_borrow_mut(|taken| {
            if let Some(taken) = taken {
                taken.push(Taken { path: self.name(name), kind: kind() });
            }
        });
        self.map.remove(name).filter(|v| !v.is_null())
    }

    /// Whether a field is there, and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }

    /// Name of a field with the place of its object.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, Kind::Boolean, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        self.typed(name, Kind::Number, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    /// A whole number of 0 or more.
    pub(crate) fn count(&mut self, name: &str) -> Result<Option<usize>, ApiError> {
        self.typed(name, Kind::Count, "a whole number of 0 or more", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A whole number of 1 or more.
    pub(crate) fn positive(&mut self, name: &str) -> Result<Option<usize>, ApiError> {
        match self.count(name)? {
            Some(0) => Err(ApiError::invalid(name, "must be at least 1")),
            n => Ok(n),
        }
    }

    /// A whole number of 64 bits, with a sign or without.
    pub(crate) fn whole(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        self.typed(name, Kind::Whole, "a whole number", |v| v.as_u64().or(v.as_i64().map(i64::cast_unsigned)))
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take_as(name, || Kind::Text) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong(&self.name(name), "a string", &other)),
        }
    }

    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take_as(name, || Kind::List) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.name(name), "a list", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take_as(name, || Kind::Object) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(&self.name(name), "an object", &other)),
        }
    }

    /// A field that this server has only one value of; anything else is an error that names it.
    pub(crate) fn only(&mut self, name: &str, supported: &[Value]) -> Result<(), ApiError> {
        match self.take_as(name, || Kind::Only(supported.to_vec())) {
            Some(value) if !supported.contains(&value) => {
                Err(ApiError::unsupported(self.name(name), "is not supported by this server"))
            }
            _ => Ok(()),
        }
    }

    /// The names of the fields that are left.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, v)| !v.is_null()) {
            Some((name, _)) => {
                let short: String = name.chars().take(100).collect();
                Err(ApiError::unsupported(
                    format!("{}{short}", self.path),
                    "is not a field that this server knows",
                ))
            }
            None => Ok(()),
        }
    }

    fn typed<T>(
        &mut self,
        name: &str,
        kind: Kind,
        want: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.take_as(name, || kind) {
            None => Ok(None),
            Some(value) => match read(&value) {
                Some(x) => Ok(Some(x)),
                None => Err(wrong(&self.name(name), want, &value)),
            },
        }
    }
}

/// A value of the wrong type. Numbers are short and say what is wrong; texts may be prompts.
pub(crate) fn wrong(param: &str, want: &str, found: &Value) -> ApiError {
    match found {
        Value::Number(n) => ApiError::invalid(param, format!("must be {want}, found {n}")),
        other => ApiError::invalid(param, format!("must be {want}, found {}", kind(other))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

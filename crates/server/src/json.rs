//! JSON from clients, in which no object names a key twice. `serde_json` keeps the last of two and others keep the
//! first, so that a proxy and this server could read two requests in one body: it is refused.

use std::{cell::RefCell, fmt, fmt::Write};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, map::Entry};

/// Longest key that an error quotes, in characters.
const KEY_CHARACTERS_MAX: usize = 100;

/// Why a text is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonError {
    /// It is no JSON; says why and where.
    Syntax(String),
    /// The key at this place is there twice, like `messages[0].role`.
    Twice(String),
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(why) => f.write_str(why),
            Self::Twice(place) => write!(f, "{place} is there twice"),
        }
    }
}

/// Parses a text. Nesting is bounded by `serde_json`, size by the caller.
pub(crate) fn parse(text: &[u8]) -> Result<Value, JsonError> {
    let place = Place(RefCell::default());
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = (&place).deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
    value.map_err(|e| place.to_path().map_or_else(|| JsonError::Syntax(e.to_string()), JsonError::Twice))
}

/// Where a key was met for the second time, from the inside out; empty as long as there is none.
struct Place(RefCell<Vec<Step>>);

enum Step {
    Key(String),
    Index(usize),
}

impl Place {
    /// The error for a key that is there already.
    fn begin<E: serde::de::Error>(&self, key: &str) -> E {
        self.0.borrow_mut().push(Step::Key(key.into()));
        E::custom("a key is there twice")
    }

    /// Notes what lies around a key that was met twice; other errors have no place.
    fn around(&self, step: impl FnOnce() -> Step) {
        let mut steps = self.0.borrow_mut();
        if !steps.is_empty() {
            steps.push(step());
        }
    }

    fn to_path(&self) -> Option<String> {
        let mut path = String::new();
        for step in self.0.borrow().iter().rev() {
            // Writing to a string cannot fail.
            let _ = match step {
                Step::Index(i) => write!(path, "[{i}]"),
                Step::Key(key) => {
                    let point = if path.is_empty() { "" } else { "." };
                    write!(path, "{point}{}", key.chars().take(KEY_CHARACTERS_MAX).collect::<String>())
                }
            };
        }
        (!self.0.borrow().is_empty()).then_some(path)
    }
}

impl<'de> DeserializeSeed<'de> for &Place {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Place {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        serde_json::Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        let next = |seq: &mut A, at: usize| {
            seq.next_element_seed(self).inspect_err(|_| self.around(|| Step::Index(at)))
        };
        while let Some(value) = next(&mut seq, list.len())? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            match object.entry(key) {
                Entry::Occupied(entry) => return Err(self.begin(entry.key())),
                Entry::Vacant(entry) => {
                    let value = map.next_value_seed(self);
                    let value = value.inspect_err(|_| self.around(|| Step::Key(entry.key().clone())))?;
                    entry.insert(value);
                }
            }
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_serde_json_reads_is_read_the_same() {
        for text in [
            "null",
            "[true, false, 0, -1, 18446744073709551615, 1.5e3, 1e-400, \"\\u00e9\\n\", [], {}]",
            r#" {"b": {"a": 1, "b": {"a": 2}}, "a": [{"a": 1}, {"a": 1}], "": 1, "A": 2} "#,
            r#"{"a": "{\"a\": 1, \"a\": 2}"}"#,
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(serde_json::from_str(text).unwrap()), "{text}");
        }
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        for text in ["", "{", "{} {}", "[1,]", "{\"a\"}", "nul", "1e999", "{'a': 1}", "\u{1}", &deep(200)] {
            let theirs = serde_json::from_str::<Value>(text).unwrap_err();
            assert_eq!(parse(text.as_bytes()), Err(JsonError::Syntax(theirs.to_string())), "{text}");
        }
        assert!(matches!(parse(b"\"\xff\""), Err(JsonError::Syntax(_))));
    }

    #[test]
    fn a_key_that_is_there_twice_is_named_with_its_place() {
        let long = format!(r#"{{"{0}": 1, "{0}": 2}}"#, "k".repeat(5000));
        for (text, place) in [
            (r#"{"a": 1, "a": 1}"#, "a"),
            (r#"{"a": 1, "b": 2, "a": null}"#, "a"),
            (r#"{"a": 1, "\u0061": 2}"#, "a"),
            (r#"[0, {"a": {"b": [[], [{"c": 1, "c": 2}]]}}]"#, "[1].a.b[1][0].c"),
            (r#"{"messages": [{"role": "user"}, {"role": "user", "role": "system"}]}"#, "messages[1].role"),
            (r#"{"": 1, "": 2}"#, ""),
            // What is wrong behind it does not matter any more.
            (r#"{"a": 1, "a": ]"#, "a"),
            (&long, &"k".repeat(KEY_CHARACTERS_MAX)),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(JsonError::Twice(place.into())), "{text}");
        }
        // An error before it comes first.
        assert!(matches!(parse(br#"{"a": [1, x], "a": 1}"#), Err(JsonError::Syntax(_))));
    }
}

//! From what a parser takes to a JSON schema.

use serde_json::{Value, json};

use crate::openai::fields::{Kind, Taken};

/// The schema of an object with these fields, those of objects and lists inside of it included.
pub(super) fn object(taken: &[Taken]) -> Value {
    let mut root = json!({"type": "object"});
    for field in taken {
        let place = place(&mut root, &field.path);
        let found = of(&field.kind);
        if let (Some(place), Some(found)) = (place.as_object_mut(), found.as_object()) {
            for (name, value) in found {
                place.entry(name).or_insert(value.clone());
            }
        }
    }
    close(&mut root);
    root
}

/// OpenAI's error body.
pub(super) fn error() -> Value {
    let text = json!({"type": ["string", "null"]});
    json!({
        "type": "object",
        "required": ["error"],
        "properties": {"error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text},
        }},
    })
}

/// The schema at a path like `messages[2].content[0].text`, made on the way.
fn place<'a>(root: &'a mut Value, path: &str) -> &'a mut Value {
    let mut at = root;
    for name in path.split('.') {
        let mut parts = name.split('[');
        at = &mut at["properties"][parts.next().unwrap_or_default()];
        if at.is_null() {
            *at = json!({});
        }
        for _ in parts {
            at = &mut at["items"];
            if at.is_null() {
                *at = json!({});
            }
        }
    }
    at
}

fn of(kind: &Kind) -> Value {
    match kind {
        Kind::Any => json!({}),
        Kind::Boolean => json!({"type": ["boolean", "null"]}),
        Kind::Number => json!({"type": ["number", "null"]}),
        Kind::Count => json!({"type": ["integer", "null"], "minimum": 0}),
        Kind::Whole => json!({"type": ["integer", "null"]}),
        Kind::Text => json!({"type": ["string", "null"]}),
        Kind::List => json!({"type": ["array", "null"]}),
        Kind::Object => json!({"type": ["object", "null"]}),
        Kind::Only(values) => {
            let mut values = values.clone();
            values.push(Value::Null);
            json!({"enum": values})
        }
    }
}

/// Objects whose fields are known have no others.
fn close(schema: &mut Value) {
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(close);
    }
    if let Some(items) = schema.get_mut("items") {
        close(items);
    }
    if schema.get("properties").is_some() {
        schema["additionalProperties"] = false.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::fields::{Fields, watch};

    #[test]
    fn what_a_parser_takes_is_what_the_schema_says() {
        let body = br#"{"list": [{"a": 1}, {"a": 2}], "inner": {"b": true}}"#;
        let (parsed, taken) = watch(|| {
            let mut fields = Fields::from_body(body)?;
            for (i, value) in fields.list("list")?.unwrap_or_default().into_iter().enumerate() {
                let mut entry = Fields::nested(value, &format!("list[{i}]"))?;
                entry.count("a")?;
                entry.finish()?;
            }
            if let Some(inner) = fields.take("inner") {
                let mut inner = Fields::nested(inner, "inner")?;
                inner.boolean("b")?;
                inner.only("c", &[json!("x")])?;
                inner.finish()?;
            }
            fields.number("absent")?;
            fields.finish()
        });
        assert_eq!(parsed, Ok(()));
        let want = json!({
            "type": "object", "additionalProperties": false,
            "properties": {
                "list": {"type": ["array", "null"], "items": {
                    "properties": {"a": {"type": ["integer", "null"], "minimum": 0}}, "additionalProperties": false,
                }},
                "inner": {"additionalProperties": false, "properties": {
                    "b": {"type": ["boolean", "null"]}, "c": {"enum": ["x", null]},
                }},
                "absent": {"type": ["number", "null"]},
            },
        });
        assert_eq!(object(&taken), want);
        let ((), none) = watch(|| ());
        assert!(none.is_empty(), "what one parser took is not the next one's");
    }
}

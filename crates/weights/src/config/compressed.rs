//! `quantization_config` of compressed-tensors: symmetric INT4 in groups of 32, packed into words.
//!
//! Which modules are packed is not taken from `targets` and `ignore`: a tensor is packed if the files have it so.

use serde_json::{Value, json};

use super::{Fields, brief};
use crate::Error;

/// # Errors
/// [`Error::Config`], naming the field, for every other way to quantise.
pub(super) fn check(q: &Fields<'_>) -> Result<(), Error> {
    expect(q, "format", q.get("format"), &json!("pack-quantized"))?;
    if let Some(scheme) = q.get("kv_cache_scheme") {
        return Err(q.error("kv_cache_scheme", format!("found {}, supported is null", brief(scheme))));
    }
    let groups = match q.get("config_groups") {
        Some(Value::Object(groups)) if !groups.is_empty() => groups,
        Some(other) => {
            return Err(q.error("config_groups", format!("expected groups, found {}", brief(other))));
        }
        None => return Err(q.error("config_groups", "missing".into())),
    };
    for (name, group) in groups {
        check_group(q, &format!("config_groups.{name}"), group)?;
    }
    Ok(())
}

fn check_group(q: &Fields<'_>, path: &str, group: &Value) -> Result<(), Error> {
    for activations in ["input_activations", "output_activations"] {
        if let Some(found) = group.get(activations).filter(|v| !v.is_null()) {
            let why = format!("found {}, supported is null", brief(found));
            return Err(q.error(&format!("{path}.{activations}"), why));
        }
    }
    let weights = group.get("weights");
    let supported = [
        ("num_bits", json!(4)),
        ("type", json!("int")),
        ("strategy", json!("group")),
        ("group_size", json!(32)),
        ("symmetric", json!(true)),
    ];
    for (field, supported) in supported {
        let found = weights.and_then(|w| w.get(field)).filter(|v| !v.is_null());
        expect(q, &format!("{path}.weights.{field}"), found, &supported)?;
    }
    // Columns in another order need an index that is not read.
    match weights.and_then(|w| w.get("actorder")) {
        None | Some(Value::Null | Value::Bool(false)) => Ok(()),
        Some(Value::String(order)) if order == "static" || order == "weight" => Ok(()),
        Some(other) => {
            let why = format!("found {}, supported are null and static", brief(other));
            Err(q.error(&format!("{path}.weights.actorder"), why))
        }
    }
}

fn expect(q: &Fields<'_>, path: &str, found: Option<&Value>, supported: &Value) -> Result<(), Error> {
    match found {
        Some(found) if found == supported => Ok(()),
        Some(other) => Err(q.error(path, format!("found {}, supported is {supported}", brief(other)))),
        None => Err(q.error(path, format!("missing, supported is {supported}"))),
    }
}

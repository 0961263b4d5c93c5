//! How deep a JSON text goes, before it is parsed.

/// Whether no more than `most` objects and lists lie inside of each other. What is no JSON is the parser's to refuse.
pub(crate) fn is_within(json: &[u8], most: usize) -> bool {
    let (mut depth, mut in_text, mut escaped) = (0usize, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => {
                depth += 1;
                if depth > most {
                    return false;
                }
            }
            b'}' | b']' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::is_within;

    #[test]
    fn depth_is_counted_outside_of_texts() {
        for (json, depth) in [
            ("7", 0),
            ("[]", 1),
            (r#"{"a": [1, {"b": []}], "c": [[2]]}"#, 4),
            (r#"["[[[[", "\"[[", "\\", []]"#, 2),
            ("[[[", 3),
            ("]]]][[", 2),
        ] {
            assert!(is_within(json.as_bytes(), depth), "{json}");
            assert!(depth == 0 || !is_within(json.as_bytes(), depth - 1), "{json}");
        }
    }
}

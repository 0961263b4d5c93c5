//! Op tests that any backend runs.

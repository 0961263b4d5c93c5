//! Responses that can be asked for again: in memory, bounded, each for the client that made it.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::Value;
use tokio::sync::watch;

use crate::{
    error::ApiError,
    limits::{RESPONSES_BYTES_MAX, RESPONSES_MAX},
    relay::Asker,
};

/// The store. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Store(Arc<Shared>);

struct Shared {
    /// Keys of the hash that tells clients apart; nobody outside can know it.
    owners: RandomState,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<String, Entry>,
    /// Oldest first; ids that were deleted may still be here.
    order: VecDeque<String>,
    bytes: usize,
}

struct Entry {
    owner: u64,
    stored: Stored,
    bytes: usize,
}

/// A response and what it was made from.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) response: Value,
    /// Items before the answer: those of earlier responses, and this one's own.
    pub(crate) input: Vec<Arc<Value>>,
    /// How many of them are its own.
    pub(crate) own: usize,
    /// Set to end it while it runs.
    pub(crate) cancel: watch::Sender<bool>,
}

impl Stored {
    /// What a response that follows continues.
    pub(crate) fn history(&self) -> Vec<Arc<Value>> {
        let output = self.response["output"].as_array().into_iter().flatten();
        self.input.iter().cloned().chain(output.cloned().map(Arc::new)).collect()
    }

    /// Roughly what it takes; earlier items are shared with earlier responses.
    fn bytes(&self) -> usize {
        let own = self.input.iter().skip(self.input.len() - self.own);
        own.map(|v| size(v)).sum::<usize>()
            + size(&self.response)
            + self.input.len() * size_of::<Arc<Value>>()
    }
}

impl Store {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared { owners: RandomState::new(), entries: Mutex::default() }))
    }

    /// Keeps a response, in place of what was kept under its id; the oldest ones make room.
    pub(crate) fn put(&self, asker: &Asker, id: &str, stored: Stored) {
        let (owner, bytes) = (self.owner(asker), stored.bytes());
        let mut entries = self.lock();
        if entries.remove(id).is_none() {
            entries.order.push_back(id.into());
        }
        entries.bytes += bytes;
        entries.by_id.insert(id.into(), Entry { owner, stored, bytes });
        while entries.by_id.len() > RESPONSES_MAX
            || (entries.bytes > RESPONSES_BYTES_MAX && entries.by_id.len() > 1)
        {
            let Some(oldest) = entries.order.pop_front() else { break };
            entries.remove(&oldest);
        }
        // Deleted ids must not pile up.
        if entries.order.len() > 2 * RESPONSES_MAX {
            let Entries { by_id, order, .. } = &mut *entries;
            order.retain(|id| by_id.contains_key(id));
        }
    }

    /// As [`Store::put`], unless it was deleted meanwhile.
    pub(crate) fn update(&self, asker: &Asker, id: &str, stored: Stored) {
        if self.lock().by_id.contains_key(id) {
            self.put(asker, id, stored);
        }
    }

    /// The response of this id; of another client's there is none.
    ///
    /// # Errors
    /// 404
    pub(crate) fn get(&self, asker: &Asker, id: &str) -> Result<Stored, ApiError> {
        let owner = self.owner(asker);
        let entries = self.lock();
        let entry = entries.by_id.get(id).filter(|e| e.owner == owner);
        entry.map(|e| e.stored.clone()).ok_or_else(|| ApiError::response_not_found(id))
    }

    /// Forgets a response; one that runs is ended.
    ///
    /// # Errors
    /// 404
    pub(crate) fn delete(&self, asker: &Asker, id: &str) -> Result<(), ApiError> {
        let stored = self.get(asker, id)?;
        self.lock().remove(id);
        stored.cancel.send_replace(true);
        Ok(())
    }

    fn owner(&self, asker: &Asker) -> u64 {
        self.0.owners.hash_one(asker.credentials())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn remove(&mut self, id: &str) -> Option<Entry> {
        let entry = self.by_id.remove(id)?;
        self.bytes -= entry.bytes;
        Some(entry)
    }
}

/// Bytes of a value in memory, roughly.
fn size(value: &Value) -> usize {
    size_of::<Value>()
        + match value {
            Value::String(s) => s.len(),
            Value::Array(list) => list.iter().map(size).sum(),
            Value::Object(map) => map.iter().map(|(k, v)| k.len() + size_of::<String>() + size(v)).sum(),
            _ => 0,
        }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use serde_json::json;

    use super::*;

    fn asker(key: &str) -> Asker {
        let request =
            Request::builder().header("authorization", key).body(()).unwrap_or_else(|e| panic!("{e}"));
        Asker::new(&request.into_parts().0)
    }

    fn stored(text: &str) -> Stored {
        let input = vec![Arc::new(json!({"text": text}))];
        Stored {
            response: json!({"output": [{"text": "out"}]}),
            input,
            own: 1,
            cancel: watch::Sender::new(false),
        }
    }

    #[test]
    fn a_response_is_its_clients_own() {
        let store = Store::new();
        store.put(&asker("a"), "resp_1", stored("in"));
        let history = store.get(&asker("a"), "resp_1").map(|s| s.history().len());
        assert_eq!(history.unwrap_or(0), 2);
        assert!(store.get(&asker("b"), "resp_1").is_err());
        assert!(store.delete(&asker("b"), "resp_1").is_err());
        let mut cancelled = store.get(&asker("a"), "resp_1").map(|s| s.cancel.subscribe()).ok();
        assert!(store.delete(&asker("a"), "resp_1").is_ok());
        assert!(store.get(&asker("a"), "resp_1").is_err());
        assert_eq!(cancelled.as_mut().map(|c| *c.borrow_and_update()), Some(true), "what runs ends");
        store.update(&asker("a"), "resp_1", stored("late"));
        assert!(store.get(&asker("a"), "resp_1").is_err(), "a deleted response does not come back");
    }

    #[test]
    fn the_oldest_make_room() {
        let store = Store::new();
        for i in 0..RESPONSES_MAX + 5 {
            store.put(&asker("a"), &format!("r{i}"), stored("in"));
        }
        let known = |i: usize| store.get(&asker("a"), &format!("r{i}")).is_ok();
        assert!(!known(4) && known(5) && known(RESPONSES_MAX + 4));
        // Large ones push out many, and the last one stays whatever its size.
        let large = "x".repeat(RESPONSES_BYTES_MAX / 2);
        store.put(&asker("a"), "l1", stored(&large));
        store.put(&asker("a"), "l2", stored(&large));
        assert!(store.get(&asker("a"), "l1").is_err() && store.get(&asker("a"), "l2").is_ok());
        for i in 0..10 * RESPONSES_MAX {
            store.put(&asker("a"), &format!("d{i}"), stored("in"));
            let _ = store.delete(&asker("a"), &format!("d{i}"));
        }
        let entries = store.lock();
        assert!(entries.order.len() <= 2 * RESPONSES_MAX + 1, "{}", entries.order.len());
        assert_eq!(entries.bytes, entries.by_id.values().map(|e| e.bytes).sum::<usize>());
    }
}

//! API keys: made, hashed, looked up. Only hashes are kept.
//!
//! A key that [`new_key`] makes holds 256 random bits, so that SHA-256 is enough at rest: nobody can search that
//! space, and a slow hash would only make every request slow and cheap to attack.

use std::{collections::HashMap, fmt, sync::Arc};

use ring::{
    digest::{SHA256, digest},
    rand::{SecureRandom, SystemRandom},
};
use serde::Deserialize;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::quota::{Book, KeyLimits};

/// How every key begins that this server made, so that scanners for lost secrets find it.
const KEY_PREFIX: &str = "oxk_";

/// SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash of a key.
    pub fn of(key: &str) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, key.as_bytes()).as_ref());
        Self(hash)
    }

    fn from_hex(text: &str) -> Option<Self> {
        let mut hash = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (byte, at) in hash.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
        }
        Some(Self(hash))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash")
    }
}

/// A new key of 256 random bits.
///
/// # Errors
/// When the operating system gives no random bytes.
pub fn new_key() -> Result<String, String> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system gives no random bytes".to_string())?;
    Ok(bytes.iter().fold(KEY_PREFIX.to_string(), |key, byte| key + &format!("{byte:02x}")))
}

/// What a key is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Asks the model.
    #[default]
    User,
    /// Reads metrics and other things that are the operator's; does not ask the model.
    Admin,
}

/// A key as the server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// How logs and metrics call it.
    pub name: String,
    /// Its hash.
    pub hash: KeyHash,
    /// What it is for.
    pub role: Role,
    /// What it may use.
    pub limits: KeyLimits,
}

/// One entry of a key file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    #[serde(default)]
    role: Role,
    #[serde(default)]
    limits: KeyLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    #[serde(default)]
    key: Vec<Entry>,
}

impl KeyRecord {
    /// Reads a key file: TOML, with a table `[[key]]` for each key, as [`KeyRecord::to_toml`] writes it.
    ///
    /// # Errors
    /// What is wrong with it, without quoting a hash.
    pub fn read(text: &str) -> Result<Vec<Self>, String> {
        let file: KeyFile = basic_toml::from_str(text).map_err(|e| e.to_string())?;
        let mut records: Vec<Self> = Vec::new();
        for entry in file.key {
            let Entry { name, sha256, role, limits } = entry;
            check_name(&name)?;
            let hash = KeyHash::from_hex(&sha256)
                .ok_or_else(|| format!("key {name:?}: sha256 must be 64 hexadecimal digits"))?;
            if records.iter().any(|r| r.name == name || r.hash == hash) {
                return Err(format!("key {name:?} is there twice"));
            }
            records.push(Self { name, hash, role, limits });
        }
        Ok(records)
    }

    /// The entry of a key file.
    pub fn to_toml(&self) -> String {
        let mut text = format!("[[key]]\nname = {:?}\nsha256 = \"{}\"\n", self.name, self.hash);
        if self.role == Role::Admin {
            text += "role = \"admin\"\n";
        }
        let l = &self.limits;
        let limits: String = [
            ("requests_per_minute", l.requests_per_minute),
            ("tokens_per_minute", l.tokens_per_minute),
            ("tokens_per_day", l.tokens_per_day),
            ("concurrent", l.concurrent),
        ]
        .iter()
        .filter_map(|(name, limit)| limit.map(|n| format!("{name} = {n}\n")))
        .collect();
        if !limits.is_empty() {
            text.push_str("[key.limits]\n");
            text.push_str(&limits);
        }
        text
    }
}

/// Checks that a name may stand in logs and metrics as it is.
///
/// # Errors
/// What a name must be.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if (1..=64).contains(&name.len()) && name.chars().all(plain) {
        return Ok(());
    }
    Err("the name of a key has 1 to 64 letters, digits or one of - _ . @".into())
}

/// A key that is in use, with its books.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Tells the key's requests from others'; never 0.
    pub(crate) tenant: u64,
    pub(crate) book: Arc<Book>,
    hash: KeyHash,
}

/// All keys that are in use.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: Vec<Arc<Key>>,
}

impl Keyring {
    /// A ring of these keys; of one that was on the ring `before`, what it used stays used.
    pub fn new(records: Vec<KeyRecord>, before: &Keyring) -> Self {
        let old: HashMap<&str, &Arc<Key>> = before.keys.iter().map(|k| (k.name.as_str(), k)).collect();
        let keys = records
            .into_iter()
            .map(|r| {
                let book = old.get(r.name.as_str()).map(|k| Arc::clone(&k.book));
                let book = book.unwrap_or_else(|| Arc::new(Book::new(r.limits)));
                book.set_limits(r.limits);
                let tenant = u64::from_le_bytes(r.hash.0.first_chunk().copied().unwrap_or_default()).max(1);
                Arc::new(Key { name: r.name, role: r.role, tenant, book, hash: r.hash })
            })
            .collect();
        Self { keys }
    }

    /// Whether nobody needs a key.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether metrics are for a key of their own.
    pub(crate) fn has_admin(&self) -> bool {
        self.keys.iter().any(|k| k.role == Role::Admin)
    }

    pub(crate) fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    /// The key that was presented. Every hash is compared to its end, whichever matches.
    pub(crate) fn find(&self, presented: &str) -> Option<Arc<Key>> {
        let hash = KeyHash::of(presented);
        let mut found = u32::MAX;
        for (at, key) in self.keys.iter().enumerate() {
            let same: Choice = key.hash.0.ct_eq(&hash.0);
            found.conditional_assign(&(at as u32), same);
        }
        self.keys.get(found as usize).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, key: &str) -> KeyRecord {
        let limits = KeyLimits { tokens_per_day: Some(5), concurrent: Some(2), ..KeyLimits::default() };
        KeyRecord { name: name.into(), hash: KeyHash::of(key), role: Role::User, limits }
    }

    #[test]
    fn a_file_reads_as_it_was_written() {
        let admin = KeyRecord { role: Role::Admin, limits: KeyLimits::default(), ..record("ops", "b") };
        let records = vec![record("alice", "a"), admin];
        let text: String = records.iter().map(KeyRecord::to_toml).collect();
        assert_eq!(KeyRecord::read(&text).unwrap(), records);
        assert_eq!(KeyRecord::read("# nothing yet\n").unwrap(), []);
    }

    #[test]
    fn a_wrong_file_is_refused() {
        let hash = KeyHash::of("a").to_string();
        for (text, words) in [
            ("[[key]]\nname = \"a\"".into(), "sha256"),
            ("[[key]]\nname = \"a\"\nsha256 = \"abc\"".into(), "64 hexadecimal digits"),
            (format!("[[key]]\nname = \"a b\"\nsha256 = \"{hash}\""), "letters"),
            (format!("[[key]]\nname = \"a\"\nsha256 = \"{hash}\"\nspeed = 1"), "speed"),
            (format!("[[key]]\nname = \"a\"\nsha256 = \"{hash}\"\nrole = \"king\""), "king"),
            (format!("[[key]]\nname = \"a\"\nsha256 = \"{hash}\"\n").repeat(2), "twice"),
            ("key = 5".into(), "invalid type"),
        ] {
            let error = KeyRecord::read(&text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn only_the_whole_key_opens() {
        let key = new_key().unwrap();
        assert_eq!((key.len(), new_key().unwrap() == key), (68, false));
        let ring = Keyring::new(vec![record("other", "x"), record("alice", &key)], &Keyring::default());
        assert_eq!(ring.find(&key).map(|k| k.name.clone()), Some("alice".into()));
        for wrong in ["", &key[..67], &key.to_uppercase(), &format!("{key} ")] {
            assert!(ring.find(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_ring_that_is_read_again_keeps_its_books() {
        let now = crate::quota::Moment::now();
        let ring = Keyring::new(vec![record("alice", "a")], &Keyring::default());
        assert!(ring.keys[0].book.enter(5, now).is_ok());
        let ring = Keyring::new(vec![record("alice", "new"), record("bob", "b")], &ring);
        assert!(ring.find("a").is_none());
        assert!(ring.find("new").unwrap().book.enter(1, now).is_err());
        assert!(ring.find("b").unwrap().book.enter(1, now).is_ok());
    }
}

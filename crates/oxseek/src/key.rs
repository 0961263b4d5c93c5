//! `oxseek key`: makes, lists and revokes the API keys of a key file.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use clap::{Args as ClapArgs, Subcommand};
use oxseek_server::{KeyHash, KeyLimits, KeyRecord, Role, check_name, new_key};

use crate::failure::Failure;

/// `oxseek key`
#[derive(Debug, ClapArgs)]
pub struct KeyArgs {
    #[command(subcommand)]
    pub what: KeyCommand,
    /// The key file; a server that runs reads it again on SIGHUP
    #[arg(long, env = "OXSEEK_KEYS", default_value = "keys.toml", global = true)]
    pub keys: PathBuf,
}

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it once; the file keeps only its hash
    New {
        /// How logs and metrics call it
        name: String,
        /// For /metrics, not for the model
        #[arg(long)]
        admin: bool,
        /// Most requests per minute
        #[arg(long, value_name = "N")]
        requests_per_minute: Option<u64>,
        /// Most tokens per minute, prompts and answers together
        #[arg(long, value_name = "N")]
        tokens_per_minute: Option<u64>,
        /// Most tokens per day (UTC), prompts and answers together
        #[arg(long, value_name = "N")]
        tokens_per_day: Option<u64>,
        /// Most requests at the same time
        #[arg(long, value_name = "N")]
        concurrent: Option<u64>,
    },
    /// Show names, roles and limits
    List,
    /// Take a key out of the file
    Revoke {
        /// Its name
        name: String,
    },
}

/// Runs `oxseek key`.
pub fn key(args: KeyArgs) -> Result<(), Failure> {
    let mut records = read(&args.keys)?;
    match args.what {
        KeyCommand::New {
            name,
            admin,
            requests_per_minute,
            tokens_per_minute,
            tokens_per_day,
            concurrent,
        } => {
            let limits = KeyLimits { requests_per_minute, tokens_per_minute, tokens_per_day, concurrent };
            let role = if admin { Role::Admin } else { Role::User };
            let key = add(&mut records, name, role, limits)?;
            write(&args.keys, &records)?;
            println!("{key}");
        }
        KeyCommand::List => records.iter().for_each(|r| println!("{}", describe(r))),
        KeyCommand::Revoke { name } => {
            let before = records.len();
            records.retain(|r| r.name != name);
            if records.len() == before {
                return Err(Failure::Usage(format!("{}: has no key {name:?}", args.keys.display())));
            }
            write(&args.keys, &records)?;
        }
    }
    Ok(())
}

fn add(records: &mut Vec<KeyRecord>, name: String, role: Role, limits: KeyLimits) -> Result<String, Failure> {
    check_name(&name).map_err(Failure::Usage)?;
    if records.iter().any(|r| r.name == name) {
        return Err(Failure::Usage(format!("there is a key {name:?} already; revoke it first")));
    }
    let key = new_key().map_err(Failure::Run)?;
    records.push(KeyRecord { name, hash: KeyHash::of(&key), role, limits });
    Ok(key)
}

fn describe(r: &KeyRecord) -> String {
    let l = &r.limits;
    let limits = [
        ("requests/min", l.requests_per_minute),
        ("tokens/min", l.tokens_per_minute),
        ("tokens/day", l.tokens_per_day),
        ("at the same time", l.concurrent),
    ];
    let limits: Vec<String> =
        limits.iter().filter_map(|(what, n)| n.map(|n| format!("{n} {what}"))).collect();
    let limits = if limits.is_empty() { "no limits".into() } else { limits.join(", ") };
    let role = if r.role == Role::Admin { "admin" } else { "user" };
    format!("{}  {role}  {limits}", r.name)
}

/// A file that is not there has no keys.
fn read(path: &Path) -> Result<Vec<KeyRecord>, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => KeyRecord::read(&text).map_err(|e| Failure::Usage(format!("{}: {e}", path.display()))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Failure::Run(format!("{}: {e}", path.display()))),
    }
}

/// Writes the file in one go, readable by its owner only.
fn write(path: &Path, records: &[KeyRecord]) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Run(format!("{}: {e}", path.display()));
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside).map_err(failed)?;
    let text: String = records.iter().map(|r| r.to_toml() + "\n").collect();
    file.write_all(b"# API keys of oxseek; written by `oxseek key`, which keeps no comments.\n\n")
        .and_then(|()| file.write_all(text.as_bytes()))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path))
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_revoked() {
        let path = std::env::temp_dir().join(format!("oxseek-keys-{}.toml", std::process::id()));
        let mut records = read(&path).unwrap();
        let limits = KeyLimits { concurrent: Some(2), ..KeyLimits::default() };
        let key = add(&mut records, "alice".into(), Role::User, limits).unwrap();
        assert!(add(&mut records, "alice".into(), Role::User, limits).is_err());
        assert!(add(&mut records, "a b".into(), Role::User, limits).is_err());
        write(&path, &records).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let again = read(&path).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        fs::remove_file(&path).unwrap();
        assert!(!text.contains(&key));
        assert_eq!((again, KeyHash::of(&key)), (records.clone(), records[0].hash));
        assert_eq!(describe(&records[0]), "alice  user  2 at the same time");
    }
}

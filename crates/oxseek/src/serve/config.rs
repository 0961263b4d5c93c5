//! The configuration file and the environment: they mirror every flag of `oxseek serve`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Arg, Command};
use serde_json::Value;

use crate::failure::Failure;

/// The command line, with the environment and the file behind it: a flag wins over a variable, a variable over the
/// file, the file over the default.
///
/// # Errors
/// When the file cannot be read, is no TOML, or names something that is no flag.
pub fn with_config(command: Command, arguments: &[OsString]) -> Result<Command, Failure> {
    let values = match path(arguments) {
        None => Vec::new(),
        Some(path) => {
            let wrong = |e: String| Failure::Usage(format!("{}: {e}", path.display()));
            let text = std::fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
            values(&text).map_err(wrong)?
        }
    };
    let mut unknown: Vec<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
    let command = command.mut_subcommand("serve", |serve| {
        serve.mut_args(|arg| {
            let arg = mirror(arg);
            let Some(name) = arg.get_long().map(str::to_string) else { return arg };
            match values.iter().find(|(n, _)| *n == name && name != "config") {
                Some((_, values)) => {
                    unknown.retain(|n| *n != name);
                    arg.default_values(values.clone())
                }
                None => arg,
            }
        })
    });
    match unknown.first() {
        Some(name) => Err(Failure::Usage(format!("the configuration file: {name:?} is no flag of serve"))),
        None => Ok(command),
    }
}

/// Every flag has a variable, also one whose author forgot it.
fn mirror(arg: Arg) -> Arg {
    match arg.get_long() {
        Some(long) if arg.get_env().is_none() && !["help", "version"].contains(&long) => {
            let name = format!("OXSEEK_{}", long.to_uppercase().replace('-', "_"));
            arg.env(name)
        }
        _ => arg,
    }
}

/// The file that the command line or the environment names; only `serve` has one.
fn path(arguments: &[OsString]) -> Option<PathBuf> {
    if !arguments.iter().any(|a| a == "serve") {
        return None;
    }
    let joined = |a: &OsString| a.to_str()?.strip_prefix("--config=").map(PathBuf::from);
    let apart = arguments.iter().position(|a| a == "--config").and_then(|at| arguments.get(at + 1));
    let named = arguments.iter().find_map(joined).or(apart.map(PathBuf::from));
    named.or_else(|| std::env::var_os("OXSEEK_CONFIG").filter(|p| !p.is_empty()).map(PathBuf::from))
}

/// Names as flags have them, with their values as they would stand on the command line.
fn values(text: &str) -> Result<Vec<(String, Vec<String>)>, String> {
    let Value::Object(table) = basic_toml::from_str(text).map_err(|e| e.to_string())? else {
        return Err("must be a table".into());
    };
    table
        .into_iter()
        .map(|(name, value)| {
            let list = match value {
                Value::Array(list) => list,
                one => vec![one],
            };
            let texts = list.iter().map(scalar).collect::<Option<Vec<_>>>();
            let texts =
                texts.ok_or_else(|| format!("{name}: must be text, a number, true, false or a list"))?;
            Ok((name.replace('_', "-"), texts))
        })
        .collect()
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::args::{Args, Command as What};

    fn parse(file: &str, flags: &[&str]) -> Result<crate::args::ServeArgs, String> {
        let folder = std::env::temp_dir().join(format!("oxseek-config-{}-{:p}", std::process::id(), file));
        std::fs::write(&folder, file).unwrap();
        let mut arguments: Vec<OsString> = vec!["oxseek".into(), "serve".into(), "--config".into()];
        arguments.push(folder.clone().into());
        arguments.extend(flags.iter().map(OsString::from));
        let command = with_config(Args::command(), &arguments);
        std::fs::remove_file(&folder).unwrap();
        let matches = command.map_err(|e| e.to_string())?.try_get_matches_from(arguments);
        let args = Args::from_arg_matches(&matches.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        match args.command {
            What::Serve(args) => Ok(args),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn a_file_sets_what_flags_do_not() {
        let file = "port = 9000\nhost = \"::1\"\ncors_origin = [\"https://a.example\", \"https://b.example\"]\n\
                    allow-no-key = true\nlog = \"json\"\n";
        let args = parse(file, &["--port", "9001"]).unwrap();
        assert_eq!((args.port, args.host.to_string().as_str()), (9001, "::1"));
        assert_eq!(args.entry.cors_origin, ["https://a.example", "https://b.example"]);
        assert!(args.entry.allow_no_key && args.entry.log == super::super::entry::LogArg::Json);
        assert_eq!(parse("port = 9000", &[]).unwrap().port, 9000);
    }

    #[test]
    fn a_wrong_file_is_refused_by_name() {
        for (file, words) in [
            ("speed = 3", "\"speed\" is no flag"),
            ("config = \"x\"", "\"config\" is no flag"),
            ("port = \"many\"", "--port"),
            ("port = 1\nport = 2", "duplicate key"),
            ("[port]\na = 1", "port: must be"),
            ("port 9", "expected"),
        ] {
            let error = parse(file, &[]).unwrap_err();
            assert!(error.contains(words), "{file}: {error}");
        }
    }

    #[test]
    fn every_flag_of_serve_has_a_variable() {
        let command = with_config(Args::command(), &["oxseek".into(), "serve".into()]).unwrap();
        let serve = command.find_subcommand("serve").unwrap();
        for arg in serve.get_arguments().filter(|a| a.get_id() != "help" && a.get_id() != "version") {
            let name = arg.get_env().and_then(|e| e.to_str());
            assert!(name.is_some_and(|n| n.starts_with("OXSEEK_")), "{arg:?}");
        }
    }
}

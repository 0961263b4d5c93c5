//! Who may come in: the flags, and what they mean together.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, ValueEnum, builder::BoolishValueParser};
use oxseek_server::{
    KeyHash, KeyLimits, KeyRecord, Keyring, LogFormat, Logger, Origins, Role, ServerOptions, Tls, Tracer,
};

use crate::failure::Failure;

/// Keys shorter than this can be guessed.
const KEY_BYTES_MIN: usize = 16;

/// Flags of `oxseek serve` about who may come in and what is logged.
#[derive(Debug, Clone, ClapArgs)]
pub struct EntryArgs {
    /// TOML file whose keys are flags of serve, such as `port = 8080`; flags and environment win
    #[arg(long, env = "OXSEEK_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A key that every request must carry; better through the environment, where `ps` does not show it
    #[arg(long, env = "OXSEEK_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// A key apart for /metrics
    #[arg(long, env = "OXSEEK_ADMIN_KEY", value_name = "KEY", hide_env_values = true)]
    pub admin_key: Option<String>,
    /// File of hashed keys with limits, as `oxseek key new` writes it; SIGHUP reads it again
    #[arg(long, env = "OXSEEK_KEYS", value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Listen on an address that others can reach though no key is set
    #[arg(long, env = "OXSEEK_ALLOW_NO_KEY", value_parser = BoolishValueParser::new())]
    pub allow_no_key: bool,
    /// Certificate chain, PEM; together with --tls-key it turns TLS on
    #[arg(long, env = "OXSEEK_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM
    #[arg(long, env = "OXSEEK_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Web pages of this origin may use the API (https://chat.example.com); * allows all
    #[arg(long, env = "OXSEEK_CORS_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// Name besides local ones under which a server without keys is reached
    #[arg(long, env = "OXSEEK_ALLOWED_HOST", value_name = "NAME", value_delimiter = ',')]
    pub allowed_host: Vec<String>,
    /// One line per request to standard error; prompts and keys are never in it
    #[arg(long, env = "OXSEEK_LOG", value_enum, default_value_t = LogArg::Plain)]
    pub log: LogArg,
    /// OpenTelemetry collector that gets a span per request, over HTTP in JSON: http://HOST:4318;
    /// prompts and keys are never in it
    #[arg(long, env = "OXSEEK_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Seconds that running answers may take after SIGTERM or Ctrl-C
    #[arg(long, env = "OXSEEK_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u32,
}

/// [`LogFormat`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogArg {
    Off,
    Plain,
    Json,
}

impl EntryArgs {
    /// What the server is set up with; refuses to stand open by accident.
    pub fn options(&self, host: IpAddr) -> Result<ServerOptions, Failure> {
        let records = self.key_records()?;
        if records.is_empty() && !host.is_loopback() && !self.allow_no_key {
            return Err(Failure::Usage(format!(
                "listening on {host} lets others in, and no key is set: give --api-key, --keys, or --allow-no-key \
                 if whoever reaches this address may use the model"
            )));
        }
        let tls = match (&self.tls_cert, &self.tls_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some(Tls::from_files(cert, key).map_err(Failure::Usage)?),
            _ => return Err(Failure::Usage("--tls-cert and --tls-key go together".into())),
        };
        let tracer = match &self.otlp_endpoint {
            None => Tracer::default(),
            Some(url) => Tracer::to(url).map_err(|e| Failure::Usage(format!("--otlp-endpoint: {e}")))?,
        };
        let format = match self.log {
            LogArg::Off => LogFormat::Off,
            LogArg::Plain => LogFormat::Plain,
            LogArg::Json => LogFormat::Json,
        };
        Ok(ServerOptions {
            keyring: Keyring::new(records, &Keyring::default()),
            origins: Origins { allowed: self.cors_origin.clone(), hosts: self.allowed_host.clone() },
            logger: Logger::to_stderr(format),
            tracer,
            tls,
            drain_max: Duration::from_secs(self.drain_timeout.into()),
            ..ServerOptions::default()
        })
    }

    /// All keys: of the command line, of the environment and of the key file.
    pub fn key_records(&self) -> Result<Vec<KeyRecord>, Failure> {
        let mut records = Vec::new();
        for (name, key, role) in
            [("api-key", &self.api_key, Role::User), ("admin-key", &self.admin_key, Role::Admin)]
        {
            let Some(key) = key else { continue };
            if key.len() < KEY_BYTES_MIN {
                eprintln!("oxseek: --{name} is shorter than {KEY_BYTES_MIN} bytes and can be guessed");
            }
            let hash = KeyHash::of(key);
            records.push(KeyRecord { name: name.into(), hash, role, limits: KeyLimits::default() });
        }
        if let Some(path) = &self.keys {
            let wrong = |e: String| Failure::Usage(format!("{}: {e}", path.display()));
            let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
            for record in KeyRecord::read(&text).map_err(wrong)? {
                if records.iter().any(|r| r.name == record.name || r.hash == record.hash) {
                    return Err(wrong(format!("key {:?} is set by a flag too", record.name)));
                }
                records.push(record);
            }
        }
        // An empty file means that nobody comes in yet, not that everybody does.
        if records.iter().all(|r| r.role == Role::Admin) && (self.keys.is_some() || !records.is_empty()) {
            return Err(Failure::Usage(
                "there is no key that may ask the model: `oxseek key new` makes one, or give --api-key"
                    .into(),
            ));
        }
        Ok(records)
    }
}

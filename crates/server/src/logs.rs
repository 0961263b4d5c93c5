//! The log: one line per event to standard error, plain or JSON, written by a thread of its own so that nobody waits
//! for a slow terminal. Nothing of a body, no key, no query and no path that a client made up is ever in it.

use std::{
    fmt::Write as _,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{SyncSender, sync_channel},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use crate::limits::LOG_LINES_MAX;

/// How the log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Not at all.
    #[default]
    Off,
    /// `time level message key=value ...`
    Plain,
    /// One JSON object per line.
    Json,
}

/// Where lines go. Cheap to clone.
#[derive(Clone, Default)]
pub struct Logger(Option<Arc<Sink>>);

struct Sink {
    format: LogFormat,
    lines: SyncSender<String>,
    dropped: AtomicU64,
}

impl Logger {
    /// A log to standard error.
    pub fn to_stderr(format: LogFormat) -> Self {
        Self::to(format, std::io::stderr())
    }

    /// A log to anywhere; lines that do not find a place are dropped and counted.
    pub fn to(format: LogFormat, mut out: impl Write + Send + 'static) -> Self {
        if format == LogFormat::Off {
            return Self(None);
        }
        let (lines, waiting) = sync_channel::<String>(LOG_LINES_MAX);
        let spawned = std::thread::Builder::new().name("log".into()).spawn(move || {
            // A reader that is gone ends the log, not the server.
            while let Ok(line) = waiting.recv() {
                if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
        });
        let sink = Sink { format, lines, dropped: AtomicU64::new(0) };
        Self(spawned.is_ok().then(|| Arc::new(sink)))
    }

    /// Writes a line; it is only made if someone wants it.
    pub(crate) fn write(&self, line: impl FnOnce() -> Line) {
        let Some(sink) = &self.0 else { return };
        if sink.lines.try_send(line().format(sink.format)).is_err() {
            sink.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Lines that found no place.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |sink| sink.dropped.load(Relaxed))
    }
}

/// One event.
pub(crate) struct Line {
    level: &'static str,
    message: &'static str,
    fields: Vec<(&'static str, Value)>,
}

impl Line {
    pub(crate) fn info(message: &'static str) -> Self {
        Self { level: "info", message, fields: Vec::new() }
    }

    pub(crate) fn error(message: &'static str) -> Self {
        Self { level: "error", ..Self::info(message) }
    }

    pub(crate) fn text(mut self, name: &'static str, value: &str) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    pub(crate) fn optional(self, name: &'static str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.text(name, value),
            None => self,
        }
    }

    pub(crate) fn number(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    fn format(self, format: LogFormat) -> String {
        let time = utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64));
        if format == LogFormat::Json {
            let mut map = Map::new();
            map.insert("time".into(), time.into());
            map.insert("level".into(), self.level.into());
            map.insert("message".into(), self.message.into());
            map.extend(self.fields.into_iter().map(|(name, value)| (name.to_string(), value)));
            return Value::Object(map).to_string() + "\n";
        }
        let mut line = format!("{time} {:5} {}", self.level, self.message);
        for (name, value) in self.fields {
            // Texts are quoted as JSON quotes them, so that none can forge a line.
            let _ = write!(line, " {name}={value}");
        }
        line + "\n"
    }
}

/// RFC 3339 in UTC, of milliseconds since 1970. Days to dates by Howard Hinnant's `civil_from_days`.
fn utc(millis: u64) -> String {
    let (days, ms) = (millis / 86_400_000, millis % 86_400_000);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_164_799, "2024-02-28T23:59:59.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(seconds * 1000), date);
        }
    }

    #[test]
    fn no_text_forges_a_line() {
        let line = || Line::info("request").text("request_id", "a\r\nb\u{1b}[31m\"c").number("ms", 1.5);
        let plain = line().format(LogFormat::Plain);
        assert_eq!(plain.matches('\n').count(), 1);
        assert!(plain.ends_with("info  request request_id=\"a\\r\\nb\\u001b[31m\\\"c\" ms=1.5\n"), "{plain}");
        let json: Value = serde_json::from_str(&line().format(LogFormat::Json)).unwrap();
        assert_eq!(json["request_id"], "a\r\nb\u{1b}[31m\"c");
    }
}

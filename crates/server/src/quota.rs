//! What a key may use, kept exactly: a request reserves the most that it can take, and settles when it ends.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;

const MINUTE_MICROS: u128 = 60_000_000;
const DAY_SECONDS: u64 = 86_400;

/// Limits of one key; what is not set is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyLimits {
    /// Requests per minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens per minute, of prompts and answers.
    pub tokens_per_minute: Option<u64>,
    /// Tokens per day (UTC), of prompts and answers; begins anew when the server does.
    pub tokens_per_day: Option<u64>,
    /// Requests that are answered or wait at the same time.
    pub concurrent: Option<u64>,
}

/// Which limit a request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    RequestsPerMinute,
    TokensPerMinute,
    TokensPerDay,
    Concurrent,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RequestsPerMinute => "requests per minute",
            Self::TokensPerMinute => "tokens per minute",
            Self::TokensPerDay => "tokens per day",
            Self::Concurrent => "requests at the same time",
        })
    }
}

/// Why a request may not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) limit: Limit,
    pub(crate) allowed: u64,
    /// Most tokens that the request may take.
    pub(crate) asked: u64,
    /// When the same request may go on; None if it asks for more than the limit ever allows.
    pub(crate) retry_after: Option<Duration>,
}

/// A point in time, by both of the clocks that limits need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    at: Instant,
    unix_seconds: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self { at: Instant::now(), unix_seconds }
    }

    fn day(self) -> u64 {
        self.unix_seconds / DAY_SECONDS
    }
}

/// Tokens that were set aside for a request; settled once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reserved {
    tokens: u64,
    day: u64,
}

/// What a client is told about its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    pub(crate) reset: Duration,
}

/// The books of one key.
#[derive(Debug)]
pub(crate) struct Book(Mutex<State>);

#[derive(Debug)]
struct State {
    limits: KeyLimits,
    requests: Bucket,
    tokens: Bucket,
    day: u64,
    /// Tokens of today that were used or are set aside.
    day_tokens: u64,
    open: u64,
    /// Tokens that were used since the server began.
    used: u64,
}

/// A token bucket in whole numbers: a unit is one thing in 60,000,000 parts, so that `limit` units flow in per
/// microsecond.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    used_units: u128,
    at: Instant,
}

impl Book {
    pub(crate) fn new(limits: KeyLimits) -> Self {
        let now = Moment::now();
        let empty = Bucket { used_units: 0, at: now.at };
        let state =
            State { limits, requests: empty, tokens: empty, day: now.day(), day_tokens: 0, open: 0, used: 0 };
        Self(Mutex::new(state))
    }

    /// Changes the limits; what was used stays used.
    pub(crate) fn set_limits(&self, limits: KeyLimits) {
        self.lock().limits = limits;
    }

    /// Lets a request of up to `tokens` tokens in, or says which limit it meets. All limits or none are charged.
    pub(crate) fn enter(&self, tokens: u64, now: Moment) -> Result<Reserved, Exceeded> {
        let mut s = self.lock();
        s.refill(now);
        s.check(tokens, now)?;
        let KeyLimits { requests_per_minute, tokens_per_minute, .. } = s.limits;
        if requests_per_minute.is_some() {
            s.requests.take(1);
        }
        if tokens_per_minute.is_some() {
            s.tokens.take(tokens);
        }
        s.day_tokens += tokens;
        s.open += 1;
        Ok(Reserved { tokens, day: s.day })
    }

    /// Replaces what was set aside by what was used. Tokens count for the day on which they were set aside.
    pub(crate) fn settle(&self, reserved: Reserved, used: u64, now: Moment) {
        let mut s = self.lock();
        s.refill(now);
        // Only the difference moves: what flowed in since then belongs to what was used.
        s.tokens.give_back(reserved.tokens.saturating_sub(used));
        if s.limits.tokens_per_minute.is_some() {
            s.tokens.take(used.saturating_sub(reserved.tokens));
        }
        if reserved.day == s.day {
            s.day_tokens = (s.day_tokens + used).saturating_sub(reserved.tokens);
        }
        s.used += used;
    }

    /// A request ended.
    pub(crate) fn leave(&self) {
        let mut s = self.lock();
        s.open = s.open.saturating_sub(1);
    }

    /// Tokens that were used since the server began.
    pub(crate) fn used(&self) -> u64 {
        self.lock().used
    }

    /// Room of requests and of tokens per minute, as far as they are limited. A daily limit that is nearer than the
    /// one of the minute is shown in its place.
    pub(crate) fn room(&self, now: Moment) -> (Option<Room>, Option<Room>) {
        let mut s = self.lock();
        s.refill(now);
        let requests = s.limits.requests_per_minute.map(|limit| s.requests.room(limit));
        let minute = s.limits.tokens_per_minute.map(|limit| s.tokens.room(limit));
        let day = s.limits.tokens_per_day.map(|limit| Room {
            limit,
            remaining: limit.saturating_sub(s.day_tokens),
            reset: until_tomorrow(now),
        });
        let tokens = match (minute, day) {
            (Some(minute), Some(day)) if minute.remaining <= day.remaining => Some(minute),
            (minute, day) => day.or(minute),
        };
        (requests, tokens)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn refill(&mut self, now: Moment) {
        self.requests.refill(self.limits.requests_per_minute.unwrap_or(0), now.at);
        self.tokens.refill(self.limits.tokens_per_minute.unwrap_or(0), now.at);
        // A clock that is set back does not give a day's tokens twice.
        if now.day() > self.day {
            self.day = now.day();
            self.day_tokens = 0;
        }
    }

    fn check(&self, tokens: u64, now: Moment) -> Result<(), Exceeded> {
        let l = self.limits;
        let exceeded = |limit, allowed, retry_after| Exceeded { limit, allowed, asked: tokens, retry_after };
        if let Some(allowed) = l.concurrent.filter(|&max| self.open >= max) {
            return Err(exceeded(Limit::Concurrent, allowed, Some(Duration::from_secs(1))));
        }
        if let Some(allowed) = l.requests_per_minute
            && let Some(wait) = self.requests.wait(1, allowed)
        {
            return Err(exceeded(Limit::RequestsPerMinute, allowed, wait));
        }
        if let Some(allowed) = l.tokens_per_day
            && self.day_tokens + tokens > allowed
        {
            let wait = (tokens <= allowed).then(|| until_tomorrow(now));
            return Err(exceeded(Limit::TokensPerDay, allowed, wait));
        }
        if let Some(allowed) = l.tokens_per_minute
            && let Some(wait) = self.tokens.wait(tokens, allowed)
        {
            return Err(exceeded(Limit::TokensPerMinute, allowed, wait));
        }
        Ok(())
    }
}

impl Bucket {
    fn refill(&mut self, per_minute: u64, now: Instant) {
        let micros = now.saturating_duration_since(self.at).as_micros();
        self.used_units = self.used_units.saturating_sub(micros * u128::from(per_minute));
        self.at = self.at.max(now);
    }

    fn take(&mut self, n: u64) {
        self.used_units += u128::from(n) * MINUTE_MICROS;
    }

    fn give_back(&mut self, n: u64) {
        self.used_units = self.used_units.saturating_sub(u128::from(n) * MINUTE_MICROS);
    }

    /// None when `n` may be taken now, else how long that takes: Some(None) if it never may.
    #[allow(clippy::option_option, reason = "now, later, never")]
    fn wait(&self, n: u64, per_minute: u64) -> Option<Option<Duration>> {
        let all = u128::from(per_minute) * MINUTE_MICROS;
        let need = u128::from(n) * MINUTE_MICROS;
        if need > all {
            return Some(None);
        }
        let missing = (self.used_units + need).saturating_sub(all);
        (missing > 0).then(|| Some(micros(missing.div_ceil(u128::from(per_minute).max(1)))))
    }

    fn room(&self, limit: u64) -> Room {
        let all = u128::from(limit) * MINUTE_MICROS;
        let remaining = (all.saturating_sub(self.used_units) / MINUTE_MICROS) as u64;
        let reset = micros(self.used_units.div_ceil(u128::from(limit).max(1)));
        Room { limit, remaining, reset }
    }
}

fn micros(n: u128) -> Duration {
    Duration::from_micros(u64::try_from(n).unwrap_or(u64::MAX))
}

fn until_tomorrow(now: Moment) -> Duration {
    Duration::from_secs(DAY_SECONDS - now.unix_seconds % DAY_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later(from: Moment, seconds: u64) -> Moment {
        Moment { at: from.at + Duration::from_secs(seconds), unix_seconds: from.unix_seconds + seconds }
    }

    fn noon() -> Moment {
        Moment { at: Instant::now(), unix_seconds: 20_000 * DAY_SECONDS + DAY_SECONDS / 2 }
    }

    fn book(limits: KeyLimits, now: Moment) -> Book {
        let book = Book::new(limits);
        {
            let mut s = book.lock();
            (s.day, s.requests.at, s.tokens.at) = (now.day(), now.at, now.at);
        }
        book
    }

    #[test]
    fn a_request_pays_what_it_used_and_no_more() {
        let now = noon();
        let book = book(KeyLimits { tokens_per_day: Some(100), ..KeyLimits::default() }, now);
        let reserved = book.enter(80, now).unwrap();
        let refused = book.enter(21, now).unwrap_err();
        assert_eq!((refused.limit, refused.retry_after), (Limit::TokensPerDay, Some(until_tomorrow(now))));
        book.settle(reserved, 30, now);
        book.leave();
        assert_eq!(book.used(), 30);
        assert!(book.enter(71, now).is_err());
        assert!(book.enter(70, now).is_ok());
        assert_eq!(book.enter(101, now).unwrap_err().retry_after, None);
    }

    #[test]
    fn a_minute_flows_back_exactly() {
        let now = noon();
        let limits = KeyLimits { tokens_per_minute: Some(60), ..KeyLimits::default() };
        let book = book(limits, now);
        let reserved = book.enter(60, now).unwrap();
        assert_eq!(book.enter(1, now).unwrap_err().retry_after, Some(Duration::from_secs(1)));
        assert!(book.enter(1, later(now, 1)).is_ok());
        assert!(book.enter(1, later(now, 1)).is_err());
        book.settle(reserved, 40, later(now, 1));
        let (requests, tokens) = book.room(later(now, 1));
        assert_eq!((requests, tokens.unwrap().remaining), (None, 20));
        assert_eq!(book.enter(61, now).unwrap_err().retry_after, None);
    }

    #[test]
    fn a_new_day_begins_with_nothing_used() {
        let now = noon();
        let book = book(KeyLimits { tokens_per_day: Some(10), ..KeyLimits::default() }, now);
        let yesterday = book.enter(10, now).unwrap();
        let tomorrow = later(now, DAY_SECONDS);
        let today = book.enter(10, tomorrow).unwrap();
        // What was set aside yesterday is not paid today.
        book.settle(yesterday, 10, tomorrow);
        assert_eq!(book.enter(1, tomorrow).unwrap_err().limit, Limit::TokensPerDay);
        book.settle(today, 4, tomorrow);
        assert!(book.enter(6, tomorrow).is_ok());
    }

    #[test]
    fn requests_are_counted_by_the_minute_and_at_the_same_time() {
        let now = noon();
        let limits = KeyLimits { requests_per_minute: Some(3), concurrent: Some(2), ..KeyLimits::default() };
        let book = book(limits, now);
        assert!(book.enter(1, now).is_ok() && book.enter(1, now).is_ok());
        assert_eq!(book.enter(1, now).unwrap_err().limit, Limit::Concurrent);
        book.leave();
        assert!(book.enter(1, now).is_ok());
        book.leave();
        let refused = book.enter(1, now).unwrap_err();
        let expected = (Limit::RequestsPerMinute, Some(Duration::from_secs(20)));
        assert_eq!((refused.limit, refused.retry_after), expected);
    }
}

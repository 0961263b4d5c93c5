//! Which web pages may talk to the server: CORS, and no foreign page or rebound name where no key is asked for.

use axum::http::{HeaderMap, HeaderValue, Method, header};

/// Pages of other origins that may use the API, and names that the server answers to.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    /// Origins like `https://chat.example.com`; `*` allows all.
    pub allowed: Vec<String>,
    /// Host names besides local ones, without a port.
    pub hosts: Vec<String>,
}

impl Origins {
    /// What `access-control-allow-origin` says to this request, if anything.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        if self.allowed.iter().any(|a| a == "*") {
            return Some(HeaderValue::from_static("*"));
        }
        self.allowed.iter().any(|a| a.as_bytes() == origin.as_bytes()).then(|| origin.clone())
    }

    /// Whether a browser may have been made to send this request by a page that is not ours. Asked where no key
    /// protects the server: a name that was pointed at this machine, or a page of another origin that changes things
    /// or opens a socket.
    pub(crate) fn is_foreign(&self, method: &Method, headers: &HeaderMap) -> bool {
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
        if host.is_some_and(|h| !self.is_ours(h)) {
            return true;
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return false };
        let authority = origin.to_str().ok().and_then(|o| o.split_once("://")).map(|(_, a)| a);
        let same = authority.is_some() && authority == host;
        let reads = matches!(*method, Method::GET | Method::HEAD) && !headers.contains_key(header::UPGRADE);
        !same && !reads && self.allow(headers).is_none()
    }

    /// Addresses and names without a dot cannot be registered by anybody.
    fn is_ours(&self, host: &str) -> bool {
        let name = if let Some(v6) = host.strip_prefix('[') {
            v6.split(']').next().unwrap_or_default()
        } else {
            host.rsplit_once(':').map_or(host, |(name, _)| name)
        };
        name.parse::<std::net::IpAddr>().is_ok()
            || !name.contains('.')
            || name.ends_with(".localhost")
            || self.hosts.iter().any(|h| h.eq_ignore_ascii_case(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(k, v)| (header::HeaderName::from_static(k), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn foreign_pages_and_names_are_seen() {
        let origins =
            Origins { allowed: vec!["https://chat.example".into()], hosts: vec!["ai.example.com".into()] };
        for (method, pairs, foreign) in [
            (Method::POST, vec![("host", "127.0.0.1:8080")], false),
            (Method::POST, vec![("host", "[::1]:8080")], false),
            (Method::POST, vec![("host", "localhost:8080"), ("origin", "http://localhost:8080")], false),
            (Method::POST, vec![("host", "box")], false),
            (Method::POST, vec![("host", "AI.example.com:443")], false),
            (Method::GET, vec![("host", "evil.example.com:8080")], true),
            (Method::POST, vec![("host", "localhost"), ("origin", "https://evil.example")], true),
            (Method::POST, vec![("host", "localhost"), ("origin", "null")], true),
            (Method::POST, vec![("host", "localhost"), ("origin", "https://chat.example")], false),
            (Method::GET, vec![("host", "localhost"), ("origin", "https://evil.example")], false),
            (
                Method::GET,
                vec![("host", "localhost"), ("origin", "https://evil.example"), ("upgrade", "websocket")],
                true,
            ),
            (Method::POST, vec![], false),
        ] {
            assert_eq!(origins.is_foreign(&method, &headers(&pairs)), foreign, "{method} {pairs:?}");
        }
    }

    #[test]
    fn only_allowed_origins_are_answered() {
        let one = Origins { allowed: vec!["https://a.example".into()], hosts: Vec::new() };
        assert!(one.allow(&headers(&[("origin", "https://a.example")])).is_some());
        assert!(one.allow(&headers(&[("origin", "https://b.example")])).is_none());
        assert!(one.allow(&headers(&[])).is_none());
        let all = Origins { allowed: vec!["*".into()], hosts: Vec::new() };
        assert_eq!(all.allow(&headers(&[("origin", "https://b.example")])).unwrap(), "*");
    }
}

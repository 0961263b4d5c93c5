//! An OTLP collector over plain HTTP/1.1, one connection per message.

use std::time::Duration;

use axum::{
    body::Body,
    http::{Request, Uri, header},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

/// The port of OTLP over HTTP.
const PORT_DEFAULT: u16 = 4318;
/// Longest that a collector may take to answer.
const ANSWER_SECONDS_MAX: Duration = Duration::from_secs(10);

/// Where a collector listens.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Collector {
    host: String,
    port: u16,
    /// The `host` header.
    authority: String,
    path: String,
}

impl Collector {
    /// Reads an endpoint like `http://127.0.0.1:4318`.
    pub(super) fn parse(endpoint: &str) -> Result<Self, String> {
        let uri: Uri = endpoint.parse().map_err(|e| format!("{endpoint:?} is no URL: {e}"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!(
                "{endpoint:?} must begin with http://: other ways to a collector are not supported"
            ));
        }
        let authority = uri.authority().ok_or_else(|| format!("{endpoint:?} names no host"))?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err("the endpoint must have no user name, no password and no query".into());
        }
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).into(),
            port: authority.port_u16().unwrap_or(PORT_DEFAULT),
            authority: authority.to_string(),
            path: format!("{}/v1/traces", uri.path().trim_end_matches('/')),
        })
    }

    /// Sends a message; says why it was not taken.
    pub(super) async fn post(&self, body: String) -> Result<(), String> {
        let late = |_| format!("no answer within {} s", ANSWER_SECONDS_MAX.as_secs());
        timeout(ANSWER_SECONDS_MAX, self.exchange(body)).await.map_err(late)?
    }

    async fn exchange(&self, body: String) -> Result<(), String> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        let request = Request::post(&self.path)
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .body(Body::from(body))
            .map_err(|e| e.to_string())?;
        // Ends with this function, whatever the collector does.
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let status = sender.send_request(request).await.map_err(|e| e.to_string())?.status();
        if status.is_success() { Ok(()) } else { Err(format!("status {}", status.as_u16())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_plain_http_url() {
        let of = |endpoint| Collector::parse(endpoint).map(|c| (c.host, c.port, c.authority, c.path));
        let want = |host: &str, port, authority: &str, path: &str| {
            Ok((host.to_string(), port, authority.to_string(), path.to_string()))
        };
        assert_eq!(of("http://127.0.0.1:9"), want("127.0.0.1", 9, "127.0.0.1:9", "/v1/traces"));
        assert_eq!(of("http://otel/"), want("otel", 4318, "otel", "/v1/traces"));
        assert_eq!(of("http://[::1]:5/a/b"), want("::1", 5, "[::1]:5", "/a/b/v1/traces"));
        for wrong in
            ["", "otel:4318", "https://otel:4318", "http://", "/x", "http://u:p@otel", "http://otel/?a=1"]
        {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}

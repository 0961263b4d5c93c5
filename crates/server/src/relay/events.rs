//! Server-sent events of a response body, as payloads.

use axum::body::{Body, BodyDataStream};
use futures_util::StreamExt;

/// The events of a body that this server wrote.
pub(crate) struct Events {
    body: BodyDataStream,
    /// Bytes that came and are no whole event yet.
    rest: Vec<u8>,
}

impl Events {
    pub(crate) fn new(body: Body) -> Self {
        Self { body: body.into_data_stream(), rest: Vec::new() }
    }

    /// The `data` of the next event; None at the end. Comments are left out.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.rest.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.rest.drain(..at + 2).collect();
                match data(&event) {
                    Some(payload) => return Some(payload),
                    None => continue,
                }
            }
            self.rest.extend_from_slice(&self.body.next().await?.ok()?);
        }
    }
}

fn data(event: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(event);
    text.lines().find_map(|line| line.strip_prefix("data: ").map(str::to_string))
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use futures_util::stream;

    use super::*;

    /// All payloads of a body that comes in `pieces`.
    fn payloads(pieces: &[&'static str]) -> Vec<String> {
        let pieces: Vec<Result<Bytes, std::convert::Infallible>> =
            pieces.iter().map(|p| Ok(Bytes::from_static(p.as_bytes()))).collect();
        let mut events = Events::new(Body::from_stream(stream::iter(pieces)));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap_or_else(|e| panic!("{e}"));
        runtime.block_on(async {
            let mut all = Vec::new();
            while let Some(payload) = events.next().await {
                all.push(payload);
            }
            all
        })
    }

    #[test]
    fn events_are_found_however_the_body_is_cut() {
        let body = "event: a\ndata: {\"x\":1}\n\n: still here\n\ndata: \"é\"\n\ndata: [DONE]\n\n";
        let want = ["{\"x\":1}", "\"é\"", "[DONE]"];
        assert_eq!(payloads(&[body]), want);
        for at in (0..=body.len()).filter(|&at| body.is_char_boundary(at)) {
            let (a, b) = body.split_at(at);
            assert_eq!(payloads(&[a, b]), want, "cut at {at}");
        }
        assert_eq!(payloads(&["data: a\n\ndata: b"]), ["a"], "an unfinished event is none");
    }
}

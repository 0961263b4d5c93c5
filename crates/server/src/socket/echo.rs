//! An echo over the code that serves real sockets, for the cases of Autobahn's test suite.

use std::io;

use axum::{
    Router,
    extract::ws::{WebSocket, WebSocketUpgrade},
    response::Response,
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::net::TcpListener;

use super::connection::{Incoming, bounded, split};

/// Sends back what comes, on every connection, for ever.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_echo(listener: TcpListener) -> io::Result<()> {
    let router = Router::new().route("/", get(open));
    loop {
        let (stream, _) = listener.accept().await?;
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection.with_upgrades());
    }
}

async fn open(upgrade: WebSocketUpgrade) -> Response {
    bounded(upgrade).on_upgrade(run)
}

async fn run(socket: WebSocket) {
    let (mut inbox, outbox, writer) = split(socket);
    loop {
        let sent = match inbox.next().await {
            Incoming::Text(text) => outbox.send(text.as_str().to_string()).await,
            Incoming::Binary(bytes) => outbox.send_binary(bytes).await,
            Incoming::Ended => break,
        };
        if !sent {
            break;
        }
    }
    drop((inbox, outbox));
    let _ = writer.await;
}

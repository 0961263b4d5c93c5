//! Routes, and connections that cannot be held open for nothing.

use std::{future::Future, io, pin::pin, sync::Arc};

use axum::{
    Router,
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

use crate::{
    docs::docs,
    doors::Doors,
    error::ApiError,
    health::health,
    limits::{CONNECTIONS_MAX, DRAIN_SECONDS_MAX, HEADER_BYTES_MAX, HEADER_SECONDS_MAX},
    messages,
    metrics::metrics,
    openai::{chat::chat_completions, completions::completions, models},
    openapi::openapi,
    page::page,
    responses,
    socket::{self, generation},
    state::AppState,
    tokens,
};

/// Serves until `shutdown` is ready, then lets running answers end.
///
/// # Errors
/// When the listener breaks. A broken connection is no error of the server.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let (router, doors) = router(state);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let closing = watch::Sender::new(false);
    let mut shutdown = pin!(shutdown);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let stream = tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    // Out of file descriptors, or a peer that left in the handshake: later ones may work.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                stream
            }
            () = &mut shutdown => break,
        };
        // Small pieces of a stream must not wait for each other.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_SECONDS_MAX)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut closing = closing.subscribe();
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            // How a connection ends is the client's business.
            tokio::select! {
                _ = connection.as_mut() => {}
                _ = closing.changed() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
            drop(place);
        });
    }
    drop(listener);
    closing.send_replace(true);
    let drained = async { tokio::join!(places.acquire_many(CONNECTIONS_MAX as u32), doors.sockets.close()) };
    let _ = tokio::time::timeout(DRAIN_SECONDS_MAX, drained).await;
    Ok(())
}

/// The routes, and what the doors that lead to them share.
fn router(state: AppState) -> (Router, Doors) {
    let http = Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/openapi.json", get(openapi))
        .route("/docs", get(docs))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(|| async { ApiError::no_such_route() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .with_state(state.clone());
    let doors = Doors::new(state, http.clone());
    let others = Router::new()
        .route("/ws", get(generation::open))
        .route("/v1/responses", post(responses::create).get(socket::responses::open))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .with_state(doors.clone());
    (http.merge(others), doors)
}

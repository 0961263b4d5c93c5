//! Routes, and connections that cannot be held open for nothing.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router, middleware,
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    docs::docs,
    door::door,
    doors::Doors,
    error::ApiError,
    health,
    limits::{FLUSH_SECONDS_MAX, HEADER_BYTES_MAX, HEADERS_MAX},
    messages,
    metrics::metrics,
    openai::{
        capabilities::capabilities, chat::chat_completions, completions::completions, embeddings::embeddings,
        models,
    },
    openapi::openapi,
    page::{page, part},
    patience::Patient,
    responses,
    socket::{self, generation},
    state::AppState,
    tokens,
};

/// How often a server that stops looks whether it is idle.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Serves until `shutdown` is ready. Then new requests are refused, running answers may end, and the door closes.
///
/// # Errors
/// When the listener breaks. A broken connection is no error of the server.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    state.set_local(listener.local_addr()?.ip().is_loopback());
    let (router, doors) = router(state.clone());
    let places = Arc::new(Semaphore::new(state.options().connections_max));
    let closing = watch::Sender::new(false);
    let finish = watch::Sender::new(false);
    let (tracer, logger) = (state.tracer().clone(), state.logger().clone());
    let exporter = tokio::spawn(tracer.export(logger, finish.subscribe()));
    let mut shutdown = pin!(shutdown);
    let mut deadline: Option<Instant> = None;
    // Goes on beside accepted connections: they must not put off the end.
    let mut drain = interval(DRAIN_POLL);
    drain.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            accepted = accept(&listener, &places) => {
                let Ok((stream, place)) = accepted else {
                    // Out of file descriptors, or a peer that left in the handshake: later ones may work.
                    sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let (router, closing, state) = (router.clone(), closing.subscribe(), state.clone());
                tokio::spawn(async move {
                    connection(stream, state, router, closing).await;
                    drop(place);
                });
            }
            () = &mut shutdown, if deadline.is_none() => {
                state.begin_drain();
                let sockets = doors.sockets.clone();
                tokio::spawn(async move { sockets.close().await });
                deadline = Some(Instant::now() + state.options().drain_max);
            }
            // Health checks and refusals are answered while running answers end.
            _ = drain.tick(), if deadline.is_some() => {
                if state.is_idle() || deadline.is_some_and(|d| Instant::now() >= d) {
                    break;
                }
            }
        }
    }
    drop(listener);
    closing.send_replace(true);
    // Every connection and every socket holds a place until it ends.
    let connections = places.acquire_many(state.options().connections_max as u32);
    let ended = async { tokio::join!(connections, doors.sockets.close()) };
    let _ = timeout(FLUSH_SECONDS_MAX, ended).await;
    finish.send_replace(true);
    let _ = timeout(FLUSH_SECONDS_MAX, exporter).await;
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

/// Answers a connection's requests. How it ends is the client's business.
async fn connection(stream: TcpStream, state: AppState, router: Router, closing: watch::Receiver<bool>) {
    // Small pieces of a stream must not wait for each other.
    let _ = stream.set_nodelay(true);
    state.metrics().connected();
    let options = state.options();
    let stream = Patient::new(stream, options.write_max);
    match &options.tls {
        None => requests(stream, router, options.head_max, closing).await,
        Some(tls) => {
            if let Ok(Ok(stream)) = timeout(options.head_max, tls.acceptor().accept(stream)).await {
                requests(stream, router, options.head_max, closing).await;
            }
        }
    }
    state.metrics().disconnected();
}

async fn requests<S>(stream: S, router: Router, head_max: Duration, mut closing: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_max)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        _ = &mut connection => return,
        _ = closing.wait_for(|closing| *closing) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// The routes behind the door, and what the doors that lead to them share.
fn router(state: AppState) -> (Router, Doors) {
    let http = Router::new()
        .route("/", get(page))
        .route("/web/{name}", get(part))
        .route("/health", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(metrics))
        .route("/v1/capabilities", get(capabilities))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/openapi.json", get(openapi))
        .route("/docs", get(docs))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(|| async { ApiError::no_such_route() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .with_state(state.clone());
    let doors = Doors::new(state.clone(), http.clone());
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
    let door = middleware::from_fn_with_state(state, door);
    (http.merge(others).layer(door), doors)
}

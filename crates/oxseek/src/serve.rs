//! `oxseek serve`: the HTTP server, up at once and ready when the model is.

pub mod config;
pub mod entry;
mod systemd;

use std::net::SocketAddr;

use oxseek_server::{AppState, Dialect, Model};
use tokio::net::TcpListener;

use crate::{args::ServeArgs, failure::Failure, open::open_engine};
use entry::EntryArgs;

/// Serves until Ctrl-C or SIGTERM, then lets running answers end.
pub fn serve(args: ServeArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen(args))
}

async fn listen(args: ServeArgs) -> Result<(), Failure> {
    let handed = systemd::listener().map_err(Failure::Run)?;
    let host = handed.as_ref().map_or(Ok(args.host), |l| l.local_addr().map(|a| a.ip()))?;
    let options = args.entry.options(host)?;
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let listener = match handed {
        Some(handed) => {
            handed.set_nonblocking(true)?;
            TcpListener::from_std(handed)?
        }
        None => bind(SocketAddr::new(args.host, args.port)).await?,
    };
    let local = listener.local_addr()?;
    eprintln!("oxseek: listening on {scheme}://{local}");
    let state = AppState::new(options);
    tokio::spawn(reread_keys(state.clone(), args.entry.clone()));
    tokio::spawn(feed_watchdog(state.clone()));
    let loading = tokio::task::spawn_blocking({
        let state = state.clone();
        move || {
            let opened = open_engine(&args.model, args.parallel.into(), args.queue)?;
            eprintln!("oxseek: {} is ready", opened.name);
            let engine = opened.engine.clone();
            state.ready(Model {
                name: opened.name,
                dialect: Dialect::new(opened.template.as_ref(), opened.engine.tokenizer()),
                engine: opened.engine,
                template: opened.template,
                bos: opened.bos,
                eos: opened.eos,
                sampling: opened.sampling,
            });
            systemd::notify("READY=1");
            Ok::<_, Failure>(engine)
        }
    });
    let (give_up, given_up) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(oxseek_server::serve(listener, state, async move {
        tokio::select! {
            () = interrupted() => {
                systemd::notify("STOPPING=1");
                eprintln!("oxseek: stopping; running answers may end, Ctrl-C again stops at once");
                tokio::spawn(async {
                    interrupted().await;
                    std::process::exit(130);
                });
            }
            Ok(()) = given_up => {}
        }
    }));
    let engine = loading.await.map_err(|e| Failure::Run(e.to_string()))?;
    // A server whose model did not load must not stay up and say "loading" for ever.
    let engine = engine.inspect_err(|_| {
        let _ = give_up.send(());
    })?;
    let result = server.await.map_err(|e| Failure::Run(e.to_string()))?;
    if engine.stats().requests_open == 0 {
        engine.shutdown();
    }
    // Answers that took longer than they may end with the process.
    result.map_err(Failure::from)
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|e| Failure::Run(format!("cannot listen on {address}: {e}; try another --port")))
}

/// Waits for Ctrl-C or SIGTERM.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Reads the key file again on every SIGHUP. A file that is wrong changes nothing.
async fn reread_keys(state: AppState, args: EntryArgs) {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
        while hangup.recv().await.is_some() {
            match args.key_records() {
                Ok(records) => {
                    eprintln!("oxseek: {} keys", records.len());
                    state.set_keys(records);
                }
                Err(e) => eprintln!("oxseek: the keys stay as they were: {e}"),
            }
        }
    }
    #[cfg(not(unix))]
    let _ = (state, args);
}

/// Tells systemd's watchdog that the process is well, as long as it is.
async fn feed_watchdog(state: AppState) {
    let Some(interval) = systemd::watchdog_interval() else { return };
    loop {
        if state.is_live() {
            systemd::notify("WATCHDOG=1");
        }
        tokio::time::sleep(interval).await;
    }
}

//! Listens on a free port, prints its address, and sends back what comes over WebSockets: conformance/autobahn.
#![forbid(unsafe_code)]

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("ws://{}", listener.local_addr()?);
    oxseek_server::serve_echo(listener).await
}

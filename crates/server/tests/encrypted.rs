//! TLS: what it carries, what it refuses, and files that are no certificate. The key in `tls/` is for these tests.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::{Server, post_bytes};
use oxseek_server::{ServerOptions, Tls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

/// Sends `request` over TLS, trusting the test's certificate or nothing at all.
async fn ask(server: &Server, request: &[u8], trusts: bool) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    if trusts {
        roots.add(CertificateDer::from_pem_file(file("cert.pem")).unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    // Not every peer says that it closes.
    let _ = stream.read_to_end(&mut answer).await;
    Ok(String::from_utf8(answer).unwrap())
}

#[tokio::test]
async fn requests_and_streams_come_through_and_plain_text_does_not() {
    let tls = Tls::from_files(&file("cert.pem"), &file("key.pem")).unwrap();
    let options =
        ServerOptions { tls: Some(tls), head_max: Duration::from_millis(500), ..ServerOptions::default() };
    // The server has a runtime of its own, which may not be made or dropped inside of this one.
    let server = tokio::task::spawn_blocking(|| Server::with(options)).await.unwrap();
    let health = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let answer = ask(&server, health, true).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let post = post_bytes("/v1/completions", br#"{"prompt": [5]}"#);
    let answer = ask(&server, &post, true).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(ask(&server, health, false).await.is_err(), "a certificate that nobody knows");
    // Plain HTTP gets an alert or an end, and a client that says nothing an end.
    for bytes in [health.as_slice(), b"\x16\x03"] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    tokio::task::spawn_blocking(|| drop(server)).await.unwrap();
}

#[test]
fn wrong_files_are_named() {
    let wrong = |cert: &str, key: &str| Tls::from_files(&file(cert), &file(key)).err().unwrap();
    assert!(wrong("none.pem", "key.pem").contains("none.pem"));
    assert!(wrong("key.pem", "key.pem").contains("no certificate"));
    assert!(wrong("cert.pem", "cert.pem").contains("no private key"));
}

//! Socket activation: the binary serves a socket that it was started with.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
};

/// The binary with `socket` as its descriptor 3, as systemd starts it.
fn start(socket: OwnedFd, arguments: &str) -> Child {
    let script = format!(
        "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" serve --log off {arguments} 3<&0 0</dev/null"
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_oxseek")]).env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What the binary says on its way out.
fn refusal(mut child: Child) -> (Option<i32>, String) {
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_socket_that_is_handed_over_is_served() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // The port of the command line is taken by the socket itself: it is not bound again.
    let mut child = start(listener.into(), &format!("--port {}", address.port()));
    // The request waits in the socket until the server is up.
    let answer = get(address, "/health/live");
    child.kill().unwrap();
    let (_, said) = refusal(child);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer} {said}");
    assert!(said.contains(&format!("listening on http://{address}")), "{said}");
}

#[test]
fn a_socket_that_lets_others_in_needs_a_key() {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let (code, said) = refusal(start(listener.into(), ""));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("0.0.0.0 lets others in"), "{said}");
}

#[test]
fn what_is_no_listening_tcp_socket_is_refused() {
    let (paired, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for socket in [paired.into(), datagrams.into(), file.into()] {
        let (code, said) = refusal(start(socket, ""));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("no listening TCP socket"), "{said}");
    }
}

//! systemd's protocols. Notifications (sd_notify(3)): one datagram per message to the socket that `NOTIFY_SOCKET`
//! names; nothing happens where there is none. Socket activation (sd_listen_fds(3)): a listening socket that systemd
//! opened, so that it may be a privileged port and clients wait while the server starts.

use std::{net::TcpListener, time::Duration};

/// The listening socket that was handed over (`LISTEN_FDS`, `LISTEN_PID`); None where there is none.
///
/// # Errors
/// When it is no listening TCP socket, or not the only one.
pub fn listener() -> Result<Option<TcpListener>, String> {
    let mut passed = sd_listen_fds::get().map_err(|e| format!("LISTEN_FDS, LISTEN_PID: {e}"))?;
    if passed.len() > 1 {
        return Err(format!("LISTEN_FDS: {} sockets were handed over, and one can be served", passed.len()));
    }
    let Some((_, socket)) = passed.pop() else { return Ok(None) };
    let listener = TcpListener::from(socket);
    if listener.local_addr().is_err() || !listens(&listener) {
        return Err("LISTEN_FDS: what was handed over is no listening TCP socket".into());
    }
    Ok(Some(listener))
}

/// A socket of datagrams has an address, too.
#[cfg(target_os = "linux")]
fn listens(socket: &TcpListener) -> bool {
    rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(false)
}

/// Nothing is handed over on other systems.
#[cfg(not(target_os = "linux"))]
fn listens(_: &TcpListener) -> bool {
    true
}

/// Tells systemd something, such as `READY=1`.
pub fn notify(message: &str) {
    #[cfg(unix)]
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|p| !p.is_empty()) {
        // A manager that does not listen is no reason to stop.
        let _ = send(&path, message);
    }
    #[cfg(not(unix))]
    let _ = message;
}

#[cfg(unix)]
fn send(path: &std::ffi::OsStr, message: &str) -> std::io::Result<()> {
    use std::os::unix::{ffi::OsStrExt, net::UnixDatagram};
    let socket = UnixDatagram::unbound()?;
    #[cfg(target_os = "linux")]
    if let Some(name) = path.as_bytes().strip_prefix(b"@") {
        use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};
        return socket.send_to_addr(message.as_bytes(), &SocketAddr::from_abstract_name(name)?).map(drop);
    }
    socket.send_to(message.as_bytes(), path).map(drop)
}

/// How often systemd wants to hear that the process is well: half of what it waits for.
pub fn watchdog_interval() -> Option<Duration> {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC").filter(|&n| n > 0).map(|n| Duration::from_micros((n / 2).max(1)))
}

#[cfg(all(test, unix))]
mod tests {
    #[test]
    fn a_message_is_one_datagram() {
        use std::os::unix::net::UnixDatagram;
        let path = std::env::temp_dir().join(format!("oxseek-notify-{}", std::process::id()));
        let socket = UnixDatagram::bind(&path).unwrap();
        super::send(path.as_os_str(), "READY=1").unwrap();
        let mut buffer = [0; 64];
        let n = socket.recv(&mut buffer).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&buffer[..n], b"READY=1");
    }
}

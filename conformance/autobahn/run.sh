#!/usr/bin/env bash
# Runs the cases of Autobahn's WebSocket test suite against our sockets, by the PyPI package kosoku (a Rust runner).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=conformance/autobahn
cache=.cache/autobahn
mkdir -p "$cache"

[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
cargo build --quiet -p oxseek-server --bin websocket_echo --features echo

address=$(mktemp)
target/debug/websocket_echo >"$address" &
echo_server=$!
trap 'kill "$echo_server" 2>/dev/null; rm -f "$address"' EXIT
for _ in $(seq 100); do [ -s "$address" ] && break; sleep 0.1; done
"$cache/venv/bin/python" "$here/check.py" "$(cat "$address")"

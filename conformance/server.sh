# Sourced by the conformance scripts: starts oxseek, waits until it is ready, runs a command with its address, stops it.
# usage: with_server COMMAND [ARGUMENT]...   the address comes as the last argument; SERVE_OPTIONS are given to serve

with_server() {
  local log server base ready status
  log=$(mktemp)
  # shellcheck disable=SC2086 # options are words
  "${OXSEEK:-target/release/oxseek}" serve --port 0 --parallel 8 ${SERVE_OPTIONS:-} 2>"$log" &
  server=$!
  # shellcheck disable=SC2064 # the values of now
  trap "kill $server 2>/dev/null; wait $server 2>/dev/null; rm -f '$log'" EXIT
  trap 'exit 130' INT TERM
  base=
  ready=
  for _ in $(seq 600); do
    if ! kill -0 "$server" 2>/dev/null; then break; fi
    base=$(sed -n 's#^oxseek: listening on \(http://[^ ]*\).*#\1#p' "$log" | head -n 1)
    # Python rather than curl: it is here already.
    if [ -n "$base" ] && python3 -c \
      'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$base/health" 2>/dev/null; then
      ready=1
      break
    fi
    sleep 0.1
  done
  if [ -z "$ready" ]; then
    echo "the server did not become ready; it said:" >&2
    cat "$log" >&2
    return 1
  fi
  status=0
  ("$@" "$base") || status=$?
  if [ "$status" -ne 0 ]; then
    echo "the server said:" >&2
    cat "$log" >&2
  fi
  return "$status"
}

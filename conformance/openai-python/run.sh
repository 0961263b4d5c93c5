#!/usr/bin/env bash
# Starts oxseek and checks it with the openai-python client. The server dies with this script, however it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=conformance/openai-python

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --requirement "$here/requirements.txt"

log=$(mktemp)
server=
stop() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  [ -z "$server" ] || wait "$server" 2>/dev/null || true
  rm -f "$log"
}
trap stop EXIT
trap 'exit 130' INT TERM

"${OXSEEK:-target/release/oxseek}" serve --port 0 --parallel 8 2>"$log" &
server=$!

base=
ready=
for _ in $(seq 600); do
  if ! kill -0 "$server" 2>/dev/null; then break; fi
  base=$(sed -n 's#^oxseek: listening on \(http://[^ ]*\).*#\1#p' "$log" | head -n 1)
  # Python rather than curl: it is here already.
  if [ -n "$base" ] && .venv/bin/python -c \
    'import sys, httpx; sys.exit(httpx.get(sys.argv[1], timeout=5).status_code != 200)' "$base/health" 2>/dev/null; then
    ready=1
    break
  fi
  sleep 0.1
done
if [ -z "$ready" ]; then
  echo "run.sh: the server did not become ready; it said:" >&2
  cat "$log" >&2
  exit 1
fi

status=0
.venv/bin/python "$here/check.py" "$base" || status=$?
if [ "$status" -ne 0 ]; then
  echo "run.sh: the server said:" >&2
  cat "$log" >&2
fi
exit "$status"

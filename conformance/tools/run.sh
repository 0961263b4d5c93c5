#!/usr/bin/env bash
# Starts oxseek with the demo model and calls tools out of 200 random sets. The server dies with this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

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
for _ in $(seq 600); do
  if ! kill -0 "$server" 2>/dev/null; then break; fi
  base=$(sed -n 's#^oxseek: listening on \(http://[^ ]*\).*#\1#p' "$log" | head -n 1)
  if [ -n "$base" ] && python3 -c \
    'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$base/health" 2>/dev/null; then
    python3 conformance/tools/check.py "$base" "$@"
    exit
  fi
  sleep 0.1
done
echo "run.sh: the server did not become ready; it said:" >&2
cat "$log" >&2
exit 1

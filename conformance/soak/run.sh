#!/usr/bin/env bash
# Starts oxseek and soaks it: run.sh [SECONDS] [STREAMS]. Not part of CI. The server dies with this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

log=$(mktemp)
server=
stop() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
  [ -z "$server" ] || wait "$server" 2>/dev/null || true
  rm -f "$log"
}
trap stop EXIT
trap 'exit 130' INT TERM

"${OXSEEK:-target/release/oxseek}" serve --port 0 --parallel 16 --log off 2>"$log" &
server=$!

base=
for _ in $(seq 600); do
  kill -0 "$server" 2>/dev/null || break
  base=$(sed -n 's#^oxseek: listening on \(http://[^ ]*\).*#\1#p' "$log" | head -n 1)
  grep -q 'is ready$' "$log" && break
  sleep 0.1
done
if [ -z "$base" ] || ! grep -q 'is ready$' "$log"; then
  echo "run.sh: the server did not become ready; it said:" >&2
  cat "$log" >&2
  exit 1
fi

memory() { awk '/RssAnon|VmSwap/ { sum += $2 } END { print sum }' "/proc/$server/status"; }
before=$(memory)
status=0
python3 conformance/soak/soak.py "$base" "$@" || status=$?
echo "memory: $before KiB before, $(memory) KiB after"
# It ends as it should, too: SIGTERM, nothing to answer, exit code 0.
kill -TERM "$server"
wait "$server" || { echo "FAIL exit code $? after SIGTERM"; status=1; }
server=
exit "$status"

#!/usr/bin/env bash
# Scripted conversations through openai-node, the Anthropic SDK and a client of the Responses API.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=conformance/agents
cache=.cache/agents
mkdir -p "$cache"

[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
[ -d "$cache/node_modules/openai" ] || npm install --silent --no-fund --no-audit --prefix "$cache" openai@7.57.0
cp "$here/chat.mjs" "$cache/chat.mjs"

talk() {
  local failed=0
  node "$cache/chat.mjs" "$1" || failed=1
  "$cache/venv/bin/python" "$here/messages.py" "$1" || failed=1
  "$cache/venv/bin/python" "$here/responses.py" "$1" || failed=1
  return "$failed"
}

# shellcheck source=conformance/server.sh
. conformance/server.sh
with_server talk

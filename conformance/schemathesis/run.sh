#!/usr/bin/env bash
# Generated requests against our OpenAPI document: none may be answered with a server error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=conformance/schemathesis
cache=.cache/schemathesis
mkdir -p "$cache"

[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"

generate() {
  "$cache/venv/bin/schemathesis" run "$1/openapi.json" --checks not_a_server_error \
    --exclude-path /ws --max-examples "${EXAMPLES:-50}" --request-timeout 60 --suppress-health-check all
}

# shellcheck source=conformance/server.sh
. conformance/server.sh
SERVE_OPTIONS="--ctx 128" with_server generate

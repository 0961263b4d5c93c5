#!/usr/bin/env bash
# Random conversations: our prompt must be the one that Jinja2 makes of the same template. run.sh [CONVERSATIONS] [SEED]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=conformance/jinja
cache=.cache/jinja
mkdir -p "$cache"

[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"

compare() { "$cache/venv/bin/python" "$here/check.py" "${@: -1}" "${@:1:$#-1}"; }

# shellcheck source=conformance/server.sh
. conformance/server.sh
with_server compare "$@"

#!/usr/bin/env bash
# A system prompt that 32 requests share: computed once, the last first text in a tenth of the first's time.
# prefix.sh [TOKENS]; MODEL=folder or file: another model than the demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

share() { python3 conformance/soak/prefix.py "${@: -1}" "${@:1:$#-1}"; }

# shellcheck source=conformance/server.sh
. conformance/server.sh
SERVE_OPTIONS="${MODEL:+--model $MODEL}" with_server share "$@"

#!/usr/bin/env bash
# Hostile grammars beside streams: bystander.sh [STREAMS]. Not part of CI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

watch() { python3 conformance/soak/bystander.py "${@: -1}" "${@:1:$#-1}"; }

# shellcheck source=conformance/server.sh
. conformance/server.sh
with_server watch "$@"

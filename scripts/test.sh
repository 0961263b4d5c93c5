#!/usr/bin/env bash
# Everything that must hold: format, lints, tidy rules, the openai-python client against the server, the NEON kernels
# under QEMU, and the tests of all crates. For Debian or Ubuntu on x86-64 with Rust; installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
    printf '\n== %s (after %d s)\n' "$*" "$SECONDS"
}

step "tools"
packages=()
command -v cc >/dev/null || packages+=(build-essential)
command -v npm >/dev/null || packages+=(npm)
python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
if [ ${#packages[@]} -gt 0 ]; then
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi

step "format, lints, tidy"
cargo fmt --all --check
cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
cargo xtask tidy

step "NEON kernels under QEMU"
scripts/test-neon.sh

step "build"
cargo test --quiet --locked --workspace --no-run

step "openai-python against oxseek serve"
OXSEEK=target/debug/oxseek conformance/openai-python/run.sh

step "tests"
scripts/fetch-tokenizer.sh
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --locked --workspace --profile ci
else
    cargo test --quiet --locked --workspace --no-fail-fast
fi

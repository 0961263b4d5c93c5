#!/usr/bin/env bash
# The tensor and CPU backend tests on 64-bit Arm, under QEMU: every NEON kernel runs against the scalar reference.
# Works on Debian and Ubuntu, x86-64; installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
rustup target list --installed | grep -qx "$target" || rustup target add "$target"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
# Emulated arithmetic is slow, above all that of the scalar reference that every run computes anew: optimised code and
# three threads. The other thread counts run natively.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
cargo test --release -p oxseek-tensor -p oxseek-backend-cpu --lib --tests --target "$target" -- --show-output \
    --skip every_op_on_1_thread --skip every_op_on_2_threads --skip every_op_on_8_threads --skip the_reference_passes_its_own_suite

#!/usr/bin/env bash
# Compares oxseek with llama.cpp on GGUF files of the demo model. LLAMA_BIN is a folder with llama-completion and
# llama-quantize; without it they are built once, in .cache/llama-cpp, from the source that PyPI's llama-cpp-python
# carries (some minutes). `--only q4_k Q4_K_M` checks some formats alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=0.3.36

build() {
  local at=$PWD/.cache/llama-cpp
  mkdir -p "$at"
  [ -x "$at/venv/bin/cmake" ] || { python3 -m venv "$at/venv"; "$at/venv/bin/pip" install --quiet cmake ninja scikit-build-core; }
  export PATH=$at/venv/bin:$PATH
  pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python "llama-cpp-python==$version" -d "$at"
  tar xzf "$at/llama_cpp_python-$version.tar.gz" -C "$at"
  local source=$at/llama_cpp_python-$version/vendor/llama.cpp
  # The source package has a link to a git folder that it does not carry, and cmake would wait for it for ever.
  rm -f "$source/.git"
  cmake -S "$source" -B "$at/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  cmake --build "$at/build" --target llama-completion llama-quantize llama-bench
}

if [ -z "${LLAMA_BIN:-}" ]; then
  LLAMA_BIN=.cache/llama-cpp/build/bin
  [ -x "$LLAMA_BIN/llama-quantize" ] || build
fi
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet numpy gguf
exec .venv/bin/python conformance/llama-cpp/check.py --oxseek "${OXSEEK:-target/release/oxseek}" --llama "$LLAMA_BIN" "$@"

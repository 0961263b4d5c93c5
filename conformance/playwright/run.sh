#!/usr/bin/env bash
# Starts oxseek and uses its chat page in Chromium, as a person would. With --screenshots it also writes those of the
# README. Installs what is missing: the npm packages here, and on Debian or Ubuntu the browser.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
packages=()
[ -n "$browser" ] || packages+=(chromium)
command -v npm >/dev/null || packages+=(npm)
if [ ${#packages[@]} -gt 0 ]; then
  root=()
  [ "$(id -u)" = 0 ] || root=(sudo)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" fonts-dejavu-core
  browser=${browser:-$(command -v chromium)}
fi
npm install --silent --no-audit --no-fund --no-package-lock

export CHROMIUM=$browser
export OXSEEK=${OXSEEK:-../../target/release/oxseek}
[ "${1:-}" != --screenshots ] || export SCREENSHOTS=screenshots
exec node --test --test-reporter=spec page.test.mjs

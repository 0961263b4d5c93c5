#!/usr/bin/env bash
# Runs openai-python's own tests against oxseek. Its source package on PyPI carries them.
# usage: run.sh [chat|completions|embeddings|models|responses]...   all of them without arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
here=$root/conformance/openai-python-tests
cache=$root/.cache/openai-python-tests
version=$(sed -n 's/^openai.*==//p' "$here/requirements.txt")

[ -x "$cache/venv/bin/python" ] || python3 -m venv "$cache/venv"
python=$cache/venv/bin/python
"$python" -m pip install --quiet --requirement "$here/requirements.txt"
if [ ! -d "$cache/openai-$version/tests" ]; then
  "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$cache" "openai==$version"
  tar -xzf "$cache/openai-$version.tar.gz" -C "$cache"
fi

files=()
for name in "${@:-chat completions embeddings models responses}"; do
  for one in $name; do
    case $one in
      chat) files+=(tests/api_resources/chat/test_completions.py) ;;
      completions) files+=(tests/api_resources/test_completions.py) ;;
      embeddings) files+=(tests/api_resources/test_embeddings.py) ;;
      models) files+=(tests/api_resources/test_models.py) ;;
      responses) files+=(tests/api_resources/test_responses.py tests/api_resources/responses) ;;
      *) echo "run.sh: no such group: $one" >&2; exit 2 ;;
    esac
  done
done

run_tests() {
  cd "$cache/openai-$version"
  OXSEEK_MODEL_NAME=oxseek-demo TEST_API_BASE_URL=$1/v1 PYTHONPATH=$here \
    "$python" -m pytest -p adapter -o addopts= -q --tb=short "${files[@]}"
}

# shellcheck source=conformance/server.sh
. "$root/conformance/server.sh"
with_server run_tests

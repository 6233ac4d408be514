#!/usr/bin/env bash
# Sets up what is missing, then checks style, types and behaviour. --all adds the long tests; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "long or not long" "$@"
fi
.venv/bin/python -m pytest "$@"

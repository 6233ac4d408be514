#!/usr/bin/env bash
# Sets up what is missing, then checks style, types and behaviour: about 15 minutes on 2 cores.
#   bash scripts/test.sh [--all] [arguments of pytest]      --all adds the long tests
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
QUIET=1 bash scripts/setup.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "long or not long" "$@"
fi
# One thread per process: with more, the processes would wait for each other.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"

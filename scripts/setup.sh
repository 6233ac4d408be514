#!/usr/bin/env bash
# Creates .venv and installs the pinned requirements; does nothing if that is already done.
#   bash scripts/setup.sh [requirements-dev.txt]      PYTHON=python3.11 chooses the interpreter
# QUIET=1, for scripts that call this one, omits the hint on what to do next.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
python=${PYTHON:-python3}

[ -f "$requirements" ] || { echo "error: no such requirements file: '$requirements'" >&2; exit 2; }
if ! .venv/bin/python -c '' 2>/dev/null; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python 3.11 or newer is needed; PYTHON=/path/to/python3.11 chooses one" >&2
        exit 2
    fi
    rm -rf .venv
    "$python" -m venv .venv
fi
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "error: .venv has no pip, probably because another tool made it; remove it, or add pip to it" >&2
    exit 2
fi
# The stamp holds a checksum of the requirements: changed ones are installed, unchanged ones cost
# nothing.
wanted=$(cat requirements.txt "$requirements" | cksum | tr -d ' ')
stamp=.venv/installed-$(basename "$requirements" .txt)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $requirements into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    echo "$wanted" > "$stamp"
fi
[ -n "${QUIET:-}" ] || echo ".venv is ready; activate it with: source .venv/bin/activate"

"""Imported first by every script: a Python that is too old, or without the packages, is one line and exit code 2, not a traceback.

Keep to what Python 3.7 understands: older ones must get as far as saying so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

OLDEST = (3, 11)
PACKAGES = ("torch", "torchvision", "numpy", "tqdm", "matplotlib")


def complaint(version: tuple[int, ...], is_installed: Callable[[str], bool]) -> str | None:
    """What is wrong with a Python of some version, if anything is."""
    if version < OLDEST:
        return f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {version[0]}.{version[1]}"
    missing = [name for name in PACKAGES if not is_installed(name)]
    return f"this Python has no {', '.join(missing)}" if missing else None


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


_line = complaint(tuple(sys.version_info[:2]), _is_installed)
if _line is not None:
    print(f"error: {_line}; 'bash scripts/setup.sh' makes .venv and 'source .venv/bin/activate' takes it", file=sys.stderr)
    sys.exit(2)

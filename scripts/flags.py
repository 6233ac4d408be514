"""Lists all flags as in ``--help``: ``python scripts/flags.py > docs/flags.md``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import run_command
from utils.settings.adversarial import AdversarialSettings
from utils.settings.command_line import OneLineParser
from utils.settings.common import CommonSettings
from utils.settings.flags import GROUPS, allowed
from utils.settings.robust_bird import EarlyBirdSettings

_HEAD = """# Flags
Made by `python scripts/flags.py > docs/flags.md`; do not edit.
[algorithms.md](algorithms.md) explains what the methods' flags do. Flags are spelled with `_` or
`-`; `--no-...` turns off those that are on by default. Eps and step sizes are in 1/255.
"""


def main() -> None:
    OneLineParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(_HEAD)
    print(f"## All training scripts\n{table(CommonSettings)}\n")
    print(f"## main_adv.py\n{table(AdversarialSettings)}\n")
    print(f"## Robust-Bird/train_eb.py and train_base.py\n{table(EarlyBirdSettings)}\n")
    print("`train_base.py` trains stage 1 for all of `--epochs1`; it has no `--eb_window` and no")
    print("`--eb_tolerance`.")
    print("In both, `--print_freq` defaults to 100 and `--decreasing_lr` to 50,150.")


def table(kind: type[CommonSettings]) -> str:
    """A Markdown table of the flags that only these settings have, in the order of ``--help``."""
    common = {f.name for f in dataclasses.fields(CommonSettings)}
    own = [f for f in dataclasses.fields(kind) if kind is CommonSettings or f.name not in common]
    lines = [_line(f) for group in GROUPS for f in own if f.metadata["group"] == group]
    return "\n".join(["| flag | default | what | |", "|---|---|---|---|", *lines])


def _line(f: dataclasses.Field[Any]) -> str:
    default = "" if f.default is None else f"`{f.default}`"
    if isinstance(f.default, bool):
        default = "on" if f.default else "off"
    choices = f" ({', '.join(allowed(f))})" if allowed(f) else ""
    return (
        f"| `--{f.name}` | {default} | {f.metadata['help'].replace('|', '&#124;')}{choices} |"
        f" {GROUPS[f.metadata['group']]} |"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The table of results/remedies/README.md from the summaries beside it: ``python
scripts/remedies_table.py``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "results" / "remedies"
_NAMES = {"dense": "Dense", "fb": "Flying Bird", "fbp": "Flying Bird+"}
_HEAD = [
    "method",
    "seeds",
    "best",
    "final",
    "final, averaged",
    "Diff.",
    "gap",
    "SA final",
    "density",
]


def table(folder: Path) -> str:
    """One line a method, one number a seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        groups.setdefault(path.parent.name.rsplit("-s", 1)[0], []).append(summary)
    order = sorted(groups, key=lambda name: (list(_NAMES).index(name.split("-")[0]), name))
    rows = [_row(name, groups[name]) for name in order]
    return "\n".join(f"| {' | '.join(row)} |" for row in [_HEAD, ["---"] * len(_HEAD), *rows])


def _row(name: str, runs: list[Mapping[str, Any]]) -> list[str]:
    method, *awp = name.split("-")

    def each(value: Any, form: str = ".2f") -> str:
        return ", ".join(format(value(run), form) for run in runs)

    return [
        _NAMES[method] + (" + AWP" if awp else ""),
        each(lambda run: run["settings"]["seed"], "d"),
        each(lambda run: run["best"]["test_ra"]),
        each(lambda run: run["final"]["test_ra"]),
        each(lambda run: run["average"]["test_ra"]),
        each(lambda run: run["diff"]),
        each(lambda run: run["robust_gap"]),
        each(lambda run: run["final"]["test_sa"]),
        each(lambda run: run["density"], ".3f"),
    ]


def page(folder: Path) -> str:
    """The folder's page with the table as its summaries are now."""
    text = (folder / "README.md").read_text()
    made = f"<!-- table -->\n{table(folder)}\n<!-- end -->"
    return re.sub(r"<!-- table -->.*<!-- end -->", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    (FOLDER / "README.md").write_text(page(FOLDER))

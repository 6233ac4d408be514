"""Converts a run's ``metrics.jsonl`` to CSV, one line per epoch: ``python scripts/metrics_csv.py
RUN [--out FILE]``.

Layer densities are in the columns ``density/<layer>``; mask updates are counted in ``updates``,
``updates/prune`` and ``updates/grow``. Values that an epoch does not have are left empty. Without
``--out`` the table is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import InputError, run_command
from utils.report.tables import csv_text
from utils.settings.command_line import OneLineParser
from utils.storage.files import write_atomically
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_epochs
from utils.storage.tensorboard import flattened


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the CSV (default: the terminal)"
    )
    arguments = parser.parse_args()
    table = csv_of(read_epochs(RunPaths(arguments.run)))
    if arguments.out is None:
        print(table, end="")
        return
    try:
        write_atomically(arguments.out, table.encode())
    except OSError as error:
        raise InputError(f"cannot write {arguments.out} ({error.strerror or error})") from error


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The epochs as CSV with a header; columns in the order in which they first appear."""
    flat = [flattened(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    return csv_text(names, [[row.get(name) for name in names] for row in flat])


if __name__ == "__main__":
    sys.exit(run_command(main))

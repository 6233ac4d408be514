"""One table and one picture of finished runs: ``python scripts/report.py RUN_FOLDER... [--figure FILE.png]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import OneLineParser
from utils.errors import InputError, run_command
from utils.metrics import read_epochs, read_summary, write_figure
from utils.paths import RunPaths
from utils.report import METHOD_NAMES, compared_curves, summary_table

_ORDER = list(METHOD_NAMES)


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders of finished runs")
    parser.add_argument("--figure", type=Path, help="where to write the accuracy curves")
    arguments = parser.parse_args()
    runs = sorted(((p, read_summary(p)) for p in map(RunPaths, arguments.runs)), key=lambda run: _ORDER.index(run[1]["method"]))
    if arguments.figure is not None:
        figure = compared_curves([(METHOD_NAMES[summary["method"]], read_epochs(p)) for p, summary in runs])
        try:
            write_figure(arguments.figure, figure)
        except OSError as error:
            raise InputError(f"cannot write {arguments.figure} ({error.strerror or error})") from error
    print(summary_table([summary for _, summary in runs]))
    print("RA, SA and Diff. on the test set, robust gap = training RA - test RA of the final model, in percent; FLOPs: real count")
    if arguments.figure is not None:
        print(f"accuracy curves: {arguments.figure}")


if __name__ == "__main__":
    sys.exit(run_command(main))

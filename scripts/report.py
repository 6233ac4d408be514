"""Reports on finished runs in tables, figures and a page: ``python scripts/report.py RUNS... [--out
DIR] [--paper DATASET] [--figure FILE]``.

Prints a table: one line per run, or, if some runs differ only in the seed or with ``--out`` or
``--paper``, means and spreads beside the paper's figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import InputError, require, run_command
from utils.report.paper import DATASETS
from utils.report.runs import METHOD_NAMES, Group, find_runs, grouped
from utils.report.tables import Comparison, comparison_table, markdown, summary_table
from utils.settings.command_line import OneLineParser
from utils.storage.files import FIGURE_KINDS, writable_folder, write_figure

_LEGEND = (
    "RA, SA and Diff. on the test set, robust gap = training RA - test RA of the final model, in"
    " percent; FLOPs: real count"
)


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="folders of finished runs, or folders of such folders",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write tables, figures and index.html"
    )
    parser.add_argument(
        "--paper",
        choices=list(DATASETS),
        help="the paper's data set to compare with runs on other data",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="where to write the accuracy curves: .png, .pdf or .svg",
    )
    arguments = parser.parse_args()
    drawable = arguments.figure is None or arguments.figure.suffix.lower() in FIGURE_KINDS
    require(
        drawable,
        f"--figure {arguments.figure}: the curves are written as PNG, PDF or SVG, so the file ends"
        f" in {', '.join(FIGURE_KINDS)}",
    )
    runs, unfinished = find_runs(arguments.runs)
    groups, repeated = grouped(runs)
    for note in (*unfinished, *repeated):
        print(f"note: {note}", file=sys.stderr)
    datasets = {group.settings.dataset for group in groups}
    idle = (
        f"--paper {arguments.paper} has no effect: the paper already covers the data of these runs"
        f" ({', '.join(sorted(datasets))})"
    )
    require(arguments.paper in {None, *datasets} or not datasets <= set(DATASETS), idle)
    if arguments.out is not None:
        writable_folder(arguments.out, "--out DIR")
    if arguments.figure is not None:
        _write_curves(arguments.figure, groups)
    if (
        arguments.out is None
        and arguments.paper is None
        and all(len(group.runs) == 1 for group in groups)
    ):
        print(f"{summary_table([group.first.summary for group in groups])}\n{_LEGEND}")
        _tell_apart(groups)
    else:
        print(markdown(comparison_table(Comparison.all_of(groups, arguments.paper))), end="")
    if arguments.out is not None:
        from utils.report.page import write_report

        print(f"page: {write_report(arguments.out, groups, arguments.paper)}")
    if arguments.figure is not None:
        print(f"accuracy curves: {arguments.figure}")


def _tell_apart(groups: Sequence[Group]) -> None:
    """Print which line is which run if they differ in more than the method: such lines may not be
    comparable."""
    if any(group.label != METHOD_NAMES[group.method] for group in groups):
        print("The lines differ in their settings:")
        for number, group in enumerate(groups, 1):
            print(f"{number:3}  {group.label}: {group.first.paths.root}")


def _write_curves(path: Path, groups: Sequence[Group]) -> None:
    # imported after all checks: matplotlib takes a second
    from utils.report.figures import compared_curves

    figure = compared_curves(
        [(group.label, [run.epochs for run in group.runs]) for group in groups]
    )
    try:
        write_figure(path, figure)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(run_command(main))

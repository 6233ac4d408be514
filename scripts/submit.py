"""Finished runs in the form that a benchmark or a model hub asks for: ``python scripts/submit.py
RUNS... --for ap-benchmark --out DIR [flags of main_adv.py --eval]``.

The networks are evaluated as the benchmark does (AutoAttack; an evaluation that was cut goes on),
written in its form, and loaded again as it loads them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import require, run_command
from utils.settings.command_line import OneLineParser
from utils.storage.files import writable_folder
from utils.submission import hugging_face, pruning_benchmark, release, robustbench
from utils.submission.entries import Entry, refuse_non_empty

DESTINATIONS = ("ap-benchmark", "robustbench", "huggingface", "release")


def main() -> None:
    arguments, flags = _read(sys.argv[1:])
    out = arguments.out
    refuse_non_empty(out)
    entries = [Entry.read(run) for run in arguments.runs]
    _refuse_before_work(arguments, entries, flags)
    writable_folder(out.resolve().parent, "--out DIR")
    # whole or not at all: an evaluation may be cut
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.resolve().parent))
    try:
        left = _write(arguments, entries, flags, temporary)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"what is left: {left}")


def _read(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        description=(__doc__ or "").split(":")[0],
        epilog="flags of an evaluation follow: --data, --test_subset, --device, --time_limit",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUNS", help="folders of finished runs"
    )
    parser.add_argument("--for", dest="destination", required=True, choices=DESTINATIONS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--name", help="of the method there (default: by the runs)")
    fmn = parser.add_argument_group("HO-FMN, for ap-benchmark (its own values by default)")
    fmn.add_argument("--fmn_steps", type=int, default=200, metavar="N")
    fmn.add_argument("--fmn_trials", type=int, default=32, metavar="N", help="settings tried")
    return parser.parse_known_args(list(words))


def _refuse_before_work(
    arguments: argparse.Namespace, entries: Sequence[Entry], flags: Sequence[str]
) -> None:
    fmn = min(arguments.fmn_steps, arguments.fmn_trials)
    require(fmn > 0, "--fmn_steps and --fmn_trials must be 1 or more")
    if arguments.destination == "ap-benchmark":
        pruning_benchmark.chosen(entries)
        return
    require(len(entries) == 1, f"--for {arguments.destination} takes one run")
    if arguments.destination == "robustbench":
        robustbench.ball(entries[0])
    else:
        told = f"--for {arguments.destination} evaluates nothing: {' '.join(flags)}"
        require(not flags, told)


def _write(
    arguments: argparse.Namespace, entries: Sequence[Entry], flags: Sequence[str], out: Path
) -> str:
    if arguments.destination == "ap-benchmark":
        return pruning_benchmark.write(
            entries, out, arguments.name, flags, arguments.fmn_trials, arguments.fmn_steps
        )
    if arguments.destination == "robustbench":
        return robustbench.write(entries[0], out, arguments.name, flags)
    write = release.write if arguments.destination == "release" else hugging_face.write
    return write(entries[0], out, arguments.name)


if __name__ == "__main__":
    sys.exit(run_command(main))

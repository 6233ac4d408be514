"""Prepares finished runs for a benchmark or a model hub: ``python scripts/submit.py RUNS... --for
ap-benchmark --out DIR [flags of main_adv.py --eval]``.

The networks are evaluated as the benchmark does (an interrupted evaluation resumes), written in its
format, and loaded back as it loads them.
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

from utils.errors import InputError, RunError, require, run_command
from utils.settings.command_line import OneLineParser
from utils.storage.files import writable_folder
from utils.submission import hugging_face, pruning_benchmark, release, robustbench
from utils.submission.entries import Entry, attack_settings

DESTINATIONS = ("ap-benchmark", "robustbench", "huggingface", "release")


def main() -> None:
    arguments, flags = _read(sys.argv[1:])
    out = arguments.out = arguments.out.resolve()
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    require(not taken, f"{out} already exists; --out names a new folder")
    entries = [Entry.read(run) for run in arguments.runs]
    _refuse_before_work(arguments, entries, flags)
    writable_folder(out.parent, "--out DIR")
    # all files or none: an evaluation may be interrupted
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        said = _write(arguments, entries, flags, temporary)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except (InputError, RunError) as error:  # it may name the temporary folder
        raise type(error)(str(error).replace(str(temporary), str(out))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(said.replace(str(temporary), str(out)))


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
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--name", help="method name in the submission (default: from the runs)")
    fmn = parser.add_argument_group("HO-FMN, for ap-benchmark")
    fmn.add_argument("--fmn_steps", type=int, metavar="N", help="attack steps (default 200)")
    fmn.add_argument("--fmn_trials", type=int, metavar="N", help="settings tried (default 32)")
    return parser.parse_known_args(list(words))


def _refuse_before_work(
    arguments: argparse.Namespace, entries: Sequence[Entry], flags: Sequence[str]
) -> None:
    destination, name = arguments.destination, arguments.name
    require(name is None or not set(name) & set("/\\\0\n"), f"--name {name!r} is not a file name")
    steps, trials = arguments.fmn_steps, arguments.fmn_trials
    if destination == "ap-benchmark":
        good = all(value is None or value > 0 for value in (steps, trials))
        require(good, "--fmn_steps and --fmn_trials must be 1 or more")
        for entry in pruning_benchmark.chosen(entries).values():
            attack_settings(entry, *pruning_benchmark.BALL, flags)
        return
    require(len(entries) == 1, f"--for {destination} takes one run")
    require(
        steps is None and trials is None,
        f"--fmn_steps and --fmn_trials have no effect with --for {destination}",
    )
    if destination == "robustbench":
        robustbench.checked(entries[0], name)
        attack_settings(entries[0], *robustbench.ball(entries[0]), flags)
    else:
        require(not flags, f"--for {destination} evaluates nothing: {' '.join(flags)}")


def _write(
    arguments: argparse.Namespace, entries: Sequence[Entry], flags: Sequence[str], out: Path
) -> str:
    if arguments.destination == "ap-benchmark":
        fmn = arguments.fmn_trials or 32, arguments.fmn_steps or 200
        return pruning_benchmark.write(entries, out, arguments.name, flags, *fmn)
    if arguments.destination == "robustbench":
        return robustbench.write(entries[0], out, arguments.name, flags)
    write = release.write if arguments.destination == "release" else hugging_face.write
    return write(entries[0], out, arguments.name)


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Implements ``scripts/campaign.sh``: trains runs in order of value while time is left, then packs
their results into a few small files."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tables

from utils.errors import InputError, run_command
from utils.export import Trained, packed_bytes
from utils.storage.paths import RunPaths
from utils.training.forecast import duration

_FILES, _BYTES = 8, 16 * 10**6
_SPARE = 60.0  # seconds for packing
# Of a shorter run, the time is mostly imports and compiling, which says little about longer ones.
_TELLING = 600.0  # seconds


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) < 3:
        raise InputError("scripts/campaign.sh takes a folder of data and the minutes available")
    data, minutes, *extra = sys.argv[1:]
    end = time.monotonic() + 60 * tables.decimal("MINUTES", minutes)
    call = tables.read_call("campaign", data, *extra)
    commands = tables.commands(call)
    plan = tables.plan_apart(call)
    code = train(plan, commands, end)
    pack([Path(folder) for _, folder, _ in plan], Path(call.out, "packed"))
    sys.exit(code)


def train(plan: list[tuple[str, str, float]], commands: list[list[str]], end: float) -> int:
    """Train the runs that will finish in time, one by one; returns the highest exit code."""
    codes, pace = [0], 1.0  # measured seconds over forecast ones
    for (state, folder, forecast), command in zip(plan, commands, strict=True):
        name, left = Path(folder).name, end - time.monotonic() - _SPARE
        if state == "finished":
            continue
        if forecast * pace > left:
            needed = f"{name} takes about {duration(forecast * pace)}"
            say(f"{needed} and {duration(max(0.0, left))} are left: not started")
            continue
        start = time.monotonic()
        limited = [*command, "--time_limit", f"{left / 60:.2f}"]
        try:
            failed = tables.run_all({name: limited}, jobs=1)
        except SystemExit as stop:
            failed = [(int(stop.code or 0), name)]
        codes.append(max((code for code, _ in failed), default=0))
        took = time.monotonic() - start
        if codes[-1] in tables.STOPPED:
            break
        if codes[-1]:
            say(f"{name} ended with exit code {codes[-1]} after {duration(took)}")
        else:
            if forecast:
                pace = took / forecast if forecast >= _TELLING else min(took / forecast, 1.5)
            say(f"{name} took {duration(took)}; {duration(forecast)} were forecast")
    return max(codes)


def pack(folders: list[Path], out: Path) -> None:
    """Write an archive for each finished run, split if it is large. The last file takes all runs
    that would be too many files, without their weights."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    finished = [paths for paths in map(RunPaths, folders) if paths.summary.exists()]
    for number, paths in enumerate(finished):
        content, name = archive([paths], with_weights=True), f"{paths.root.name}.tar.xz"
        is_last = number + 1 == len(finished)
        if len(written) + -(-len(content) // _BYTES) > _FILES - (not is_last):
            rest = finished[number:]
            names = ", ".join(p.root.name for p in rest)
            say(f"{names}: packed without weights, to limit the number of files")
            content, name = archive(rest, with_weights=False), "others.tar.xz"
        parts = [content[start : start + _BYTES] for start in range(0, len(content), _BYTES)]
        for place, part in enumerate(parts):
            written.append(name if len(parts) == 1 else f"{name}.{place}")
            (out / written[-1]).write_bytes(part)
        if name == "others.tar.xz":
            break
    ours = {paths.root.name for paths in finished} | {"others"}
    for old in out.glob("*.tar.xz*"):  # of an earlier call
        if old.name not in written and old.name.split(".tar.xz")[0] in ours:
            old.unlink()
    say(f"packed in {out}: {', '.join(written) or 'nothing, since no run is finished'}")
    if any(name[-1].isdigit() for name in written):
        say("parts of an archive: cat NAME.tar.xz.* | tar xJ")


def archive(runs: Sequence[RunPaths], with_weights: bool) -> bytes:
    """A tar.xz of each run's config, metrics, summary and packed best model, which ``load_model``
    reads."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=1) as file:
        for paths in runs:
            for path in (paths.config, paths.metrics, paths.summary):
                file.add(path, f"{paths.root.name}/{path.name}")
            if with_weights:
                content = packed_bytes(Trained.read(paths.best_ra))
                information = tarfile.TarInfo(f"{paths.root.name}/{paths.best_ra.name}")
                information.size = len(content)
                file.addfile(information, io.BytesIO(content))
    return packed.getvalue()


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(run_command(main))

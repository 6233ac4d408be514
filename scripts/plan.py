"""Which of some runs are finished and how long the others will take: ``python scripts/plan.py
[--jobs N] < COMMANDS``.

A command a line, as in ``main_adv.py --dataset digits --fb``. On stderr a table for people, on
stdout for scripts a line a run: its number, ``finished``, ``begun`` or ``new``, and its folder,
with tabs between.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import torch

from data import Data
from utils.errors import InputError, run_command
from utils.settings.applied import load_data_for, placed
from utils.settings.command_line import OneLineParser, parse_settings
from utils.settings.common import CommonSettings
from utils.settings.device import pick_device
from utils.settings.stored import SETTINGS_OF
from utils.storage.paths import RunPaths
from utils.storage.run_folder import read_epochs
from utils.training.forecast import duration, image_passes, images_of, seconds_per_pass

_MEASURED: dict[Any, Any] = {}


@dataclass(frozen=True)
class Planned:
    """A run, its folder, and the epochs that it has behind it, by stage."""

    settings: CommonSettings
    paths: RunPaths
    rows: int
    done: list[float]

    @property
    def state(self) -> str:
        if self.paths.summary.exists():
            return "finished"
        return "begun" if self.paths.checkpoint.exists() else "new"


def main() -> None:
    parser = OneLineParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    jobs = parser.parse_args().jobs
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}")
    runs = [planned(line) for line in sys.stdin.read().splitlines() if line.strip()]
    show(runs, jobs)
    for number, run in enumerate(runs):
        print(f"{number}\t{run.state}\t{run.paths.root}")


def planned(command: str) -> Planned:
    """The run that a command would train; raises ``InputError`` as the command would."""
    script, *flags = shlex.split(command)
    kind = SETTINGS_OF.get(Path(script).name)
    if kind is None:
        raise InputError(f"{script} trains nothing; known: {', '.join(SETTINGS_OF)}")
    asked = parse_settings(kind, flags, "", lambda given: {})
    settings, paths = placed(asked, data_of(asked), pick_device(asked))
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(InputError):  # none yet, or damaged, of which the run itself says more
        rows = read_epochs(paths)
    return Planned(settings, paths, len(rows), settings.epochs_done(rows))


def show(runs: list[Planned], jobs: int) -> None:
    """The table for people: what is there and, measured for each kind of network, how long the rest
    will take."""
    width = max((len(run.paths.root.name) for run in runs), default=0)
    seconds = [estimated(run) if run.state != "finished" else 0.0 for run in runs]
    for run, time in zip(runs, seconds, strict=True):
        state = f"{run.state}, {run.rows} epochs done" if run.state == "begun" else run.state
        about = f"about {duration(time)}" if time else ""
        print(f"{run.paths.root.name:<{width}}  {state:<24}  {about}".rstrip(), file=sys.stderr)
    # Runs beside each other on one CPU share it.
    at_once = min(jobs, max(1, torch.cuda.device_count()))
    unfinished = sum(run.state != "finished" for run in runs)
    total = f", about {duration(sum(seconds) / at_once)} on this machine" if unfinished else ""
    print(f"{unfinished} of {len(runs)} runs to train{total}", file=sys.stderr)


def data_of(settings: CommonSettings) -> Data:
    """A data set, read once: a run is named by it too."""
    which = _which(settings)
    if which not in _MEASURED:
        _MEASURED[which] = load_data_for(settings, pick_device(settings))
    return _MEASURED[which]


def _which(s: CommonSettings) -> tuple[Any, ...]:
    return (s.dataset, s.data, s.image_size, s.train_subset, s.test_subset, s.cache_dir)


def estimated(run: Planned) -> float:
    """Seconds that are left of a run; data and speed are looked at once for each data set and
    network."""
    s = run.settings
    data = data_of(s)
    network = (
        *_which(s),
        s.arch,
        s.width,
        s.depth_factor,
        s.width_factor,
        s.batch_size,
        s.precision,
    )
    if network not in _MEASURED:
        _MEASURED[network] = seconds_per_pass(s, data, pick_device(s))
    return image_passes(s, images_of(data), run.done) * _MEASURED[network]


if __name__ == "__main__":
    sys.exit(run_command(main))

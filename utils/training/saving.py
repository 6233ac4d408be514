"""The checkpoints that a run saves, and what an epoch adds to its metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from utils.settings.common import CommonSettings
from utils.storage.checkpoint import load_newest
from utils.storage.packing import compact
from utils.storage.paths import RunPaths
from utils.storage.run_folder import RunFolder
from utils.training.engine import Progress
from utils.training.stage import Row, Stage

AVERAGE = "average_"  # prefix of the averaged network's figures


class Checkpoints:
    """The checkpoints that a run can be resumed from: the newest one and the one before it.

    Attributes:
        last_good: path of the newest one that is whole.
        progress: how far the run has come there, in words; empty before the first one.
        warning: why the newest one was not loaded, if it was not.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._saved_at = time.monotonic()
        self.last_good = paths.checkpoint
        self.progress = ""
        self.warning: str | None = None

    def exist(self) -> bool:
        return self._paths.checkpoint.exists() or self._paths.previous.exists()

    def load(self) -> dict[str, Any]:
        """The contents of the newest one that is whole; raises ``InputError`` if none is."""
        content, self.last_good, self.warning = load_newest(
            self._paths.checkpoint, self._paths.previous
        )
        return content

    def save(
        self, folder: RunFolder, content: Mapping[str, Any], names: Sequence[str], progress: str
    ) -> None:
        """Queue a checkpoint for writing; ``names`` are those of the network's parameters."""

        def on_disk() -> None:
            self.progress, self.last_good = progress, self._paths.checkpoint

        # A damaged checkpoint never replaces a whole one.
        keep = self._paths.previous if self.last_good == self._paths.checkpoint else None
        folder.save(self._paths.checkpoint, compact(content, names), keep=keep, on_disk=on_disk)
        self._saved_at = time.monotonic()

    def is_due(self, settings: CommonSettings, step: int) -> bool:
        """Whether ``--save_every`` or ``--save_minutes`` asks for one after ``step`` of an
        epoch."""
        minutes = (time.monotonic() - self._saved_at) / 60
        every = settings.save_every
        return bool(every and step % every == 0) or minutes >= settings.save_minutes

    def text(self, *, with_progress: bool = True) -> str:
        """Which one a run that ends early can be resumed from."""
        if not self.last_good.exists():
            return "no epoch was finished, so there is no checkpoint yet"
        progress = f" ({self.progress})" if with_progress and self.progress else ""
        return f"the last good checkpoint is {self.last_good}{progress}"


def best_epoch(rows: Sequence[Row], key: str) -> tuple[Row, str]:
    """The row with the highest ``key``, and ``AVERAGE`` if the averaged network reached it, else
    an empty string. The first of equals wins."""
    every = [(row, kind) for row in rows for kind in ("", AVERAGE) if kind + key in row]
    return max(every, key=lambda found: found[0][found[1] + key])


def epoch_row(stage: Stage, epoch: int, trained: Progress) -> Row:
    """What training an epoch (from 0) adds to ``metrics.jsonl``, where epochs count from 1;
    accuracies are in percent."""
    further = stage.plan.further_passes(epoch)
    return {
        "epoch": epoch + 1,
        "lr": stage.plan.rate(epoch, 0, stage.steps),
        "train_loss": trained.loss,
        "train_sa" if stage.plan.attack is None else "train_ra": trained.accuracy,
        **stage.figures(),
        **({"further_passes": further} if further else {}),
        "updates": (
            [{**e, "epoch": epoch + 1} for e in stage.masking.events if e["epoch"] == epoch]
            if stage.masking
            else []
        ),
        "images_per_second": trained.images / trained.seconds,
        "train_seconds": trained.seconds,
    }

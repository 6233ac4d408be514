"""The one place that names the files of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class _File:
    """A file of a run folder, as an attribute of its ``RunPaths``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: RunPaths, kind: object = None) -> Path:
        return paths.root / self.name


@dataclass(frozen=True)
class RunPaths:
    """Files of one run folder (docs/runs.md)."""

    root: Path

    config = _File("config.json")
    metrics = _File("metrics.jsonl")
    log = _File("result.log")
    # held by the process that trains here; never removed, which would admit a second one
    lock = _File("run.lock")
    checkpoint = _File("checkpoint.pth.tar")
    previous = _File("checkpoint_previous.pth.tar")  # in case the newest is damaged
    # one-step training: the state that the current epoch began with, until the run ends
    rollback = _File("checkpoint_rollback.pth.tar")
    best_ra = _File("model_RA_best.pth.tar")
    best_sa = _File("model_SA_best.pth.tar")
    average = _File("model_average.pth.tar")  # at the end of a run with --ema or --swa
    curves = _File("net_train.png")
    tensorboard = _File("tensorboard")  # folder of events, with --tensorboard
    stage1 = _File("model_stage1.pth.tar")  # Robust Bird: the network that the ticket is of
    distances = _File("mask_distances.png")  # Robust Bird: between the masks of stage 1
    summary = _File("summary.json")

    def mask(self, epoch: int) -> Path:
        """Robust Bird: the mask after an epoch (from 1) of stage 1; removed after stage 2."""
        return self.root / "stage1_masks" / f"epoch_{epoch:04d}.pth.tar"

    def half_written(self) -> list[Path]:
        """Temporary files that ``write_atomically`` left when its process was killed; other hidden
        files are not ours."""
        files = [file.name for file in vars(RunPaths).values() if isinstance(file, _File)]
        found = (path for name in files for path in self.root.glob(f".{name}-*"))
        return [path for path in found if path.is_file() and not path.is_symlink()]

    def stamps(self) -> list[tuple[int, int, int] | None]:
        """Inode, size and time of files that change when a process trains here; None if missing."""
        stamps: list[tuple[int, int, int] | None] = []
        for path in (self.checkpoint, self.previous, self.metrics, self.summary):
            try:
                stat = path.stat()
                stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps

    def holds_a_run(self) -> bool:
        """Whether training has written here before."""
        return any(
            path.exists()
            for path in (self.config, self.metrics, self.checkpoint, self.previous, self.summary)
        )

"""The one place that names the files of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """Files of one run folder (docs/runs.md)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "result.log"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here; never removed, which would admit a second one."""
        return self.root / "run.lock"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pth.tar"

    @property
    def previous(self) -> Path:
        """The second newest checkpoint, in case the newest is damaged."""
        return self.root / "checkpoint_previous.pth.tar"

    @property
    def best_ra(self) -> Path:
        return self.root / "model_RA_best.pth.tar"

    @property
    def best_sa(self) -> Path:
        return self.root / "model_SA_best.pth.tar"

    @property
    def average(self) -> Path:
        """The averaged network at the end of a run with ``--ema`` or ``--swa``."""
        return self.root / "model_average.pth.tar"

    @property
    def curves(self) -> Path:
        return self.root / "net_train.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events, with ``--tensorboard``."""
        return self.root / "tensorboard"

    @property
    def stage1(self) -> Path:
        """Robust Bird: the dense network that the ticket was drawn from."""
        return self.root / "model_stage1.pth.tar"

    def mask(self, epoch: int) -> Path:
        """Robust Bird: the mask after an epoch (from 1) of stage 1; removed after stage 2."""
        return self.root / "stage1_masks" / f"epoch_{epoch:04d}.pth.tar"

    @property
    def distances(self) -> Path:
        """Robust Bird: plot of the distances between the masks of stage 1's epochs."""
        return self.root / "mask_distances.png"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def half_written(self) -> list[Path]:
        """Temporary files that ``write_atomically`` left when its process was killed; other hidden
        files are not ours."""
        names = [
            path.name
            for path in (
                self.config,
                self.metrics,
                self.checkpoint,
                self.previous,
                self.best_ra,
                self.best_sa,
                self.average,
            )
        ]
        names += [path.name for path in (self.curves, self.stage1, self.distances, self.summary)]
        return [
            path
            for name in names
            for path in self.root.glob(f".{name}-*")
            if path.is_file() and not path.is_symlink()
        ]

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

"""Writing and reading a run folder: config, metrics, log, plots, checkpoints and summary."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from utils.errors import InputError, RunError, printable
from utils.storage.checkpoint import save_checkpoint, snapshot
from utils.storage.files import json_bytes, locked, write_atomically, write_figure
from utils.storage.json_files import misfit, read_object, read_objects
from utils.storage.paths import RunPaths
from utils.storage.tensorboard import Events, require_tensorboard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shapes (``misfit``) of the parts of a run's files that are read back.
_FINAL = {"epoch": int, "test_ra": float, "test_sa": float, "train_ra": float}
_FLOPS = {"training": float, "inference": float}
_SUMMARY = {
    "method": str,
    "run": str,
    "best": _FINAL,
    "final": _FINAL,
    "diff": float,
    "robust_gap": float,
}
_SUMMARY |= {"average?": {**_FINAL, "robust_gap": float}}
_SUMMARY |= {"density": float, "flops": {"real": _FLOPS, "paper": _FLOPS}, "seconds?": float}
_DRAWN_HERE = {"pretrained": None, "emerged": bool, "epochs": int, "kind": str, "val_sa": float}
_EPOCH = {
    "epoch": int,
    "stage?": int,
    "density?": float,
    "layer_densities?": {"*": float},
    "ticket?": bool,
    "mask_distances?": [float],
}
_EPOCH |= {"updates?": [{"prune": bool, "grow": bool}]}
_EPOCH |= {f"{part}_{kind}?": float for part in ("train", "val", "test") for kind in ("ra", "sa")}


class RunFolder:
    """Writes one run's files; a failed write raises ``RunError`` and leaves the old file intact.

    A background thread writes checkpoints and lines of ``metrics.jsonl`` in order, while training
    continues. Its failures are raised by a later such write, by ``settle``, or on leaving
    ``settled``.
    """

    writes = True

    def __init__(
        self, paths: RunPaths, lock: FileLock | None = None, tensorboard: bool = False
    ) -> None:
        self.paths = paths
        self._lock = lock
        self._tensorboard = tensorboard
        self._events: Events | None = None  # set by ``rewrite_epochs``, which knows the past
        self._epochs = 0  # lines of metrics so far
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._behind: deque[tuple[Path, Future[None]]] = deque()
        self._broken = False  # after a failure, nothing more is written in background

    @classmethod
    def create(
        cls,
        paths: RunPaths,
        config: Mapping[str, Any],
        tensorboard: bool = False,
        stamps: object = None,
    ) -> RunFolder:
        """Create and lock the folder and write ``config.json``; ``InputError`` if that fails.

        Args:
            tensorboard: also write events of epochs and plots, from ``rewrite_epochs`` on.
            stamps: ``RunPaths.stamps`` when the folder was read, if it was, to detect another
                process that has trained since.
        """
        if tensorboard:
            require_tensorboard()
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            lock = _locked(paths)
            if stamps not in (None, paths.stamps()):
                lock.release()
                raise InputError(
                    f"another process has trained in {paths.root} in the meantime; --resume"
                    " continues from there"
                )
            for cut_off in paths.half_written():
                cut_off.unlink()
            write_atomically(paths.config, json_bytes(config))
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {paths.root} ({error.strerror or error})"
            ) from error
        return cls(paths, lock, tensorboard)

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        with self._writing(path):
            write_atomically(path, json_bytes(content))

    def say(self, line: str) -> None:
        """Print a line and append it to ``result.log``."""
        line = printable(line)
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with self._writing(self.paths.log), self.paths.log.open("a") as log:
            log.write(line + "\n")

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """Append an epoch's line to ``metrics.jsonl``, and its events, in the background."""
        line = json.dumps(row) + "\n"
        self._epochs += 1

        def write() -> None:
            with self.paths.metrics.open("a") as file:
                file.write(line)
            if self._events is not None:
                self._events.append(row)

        self._write_behind(self.paths.metrics, write)

    def rewrite_epochs(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Reset ``metrics.jsonl`` to the epochs of a checkpoint: later ones will run again."""
        self.settle()
        self._epochs = len(rows)
        with self._writing(self.paths.metrics):
            write_atomically(
                self.paths.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode()
            )
        if self._tensorboard:
            with self._writing(self.paths.tensorboard):
                self._events = Events(self.paths.tensorboard, rows)

    def save(
        self,
        path: Path,
        checkpoint: Mapping[str, Any],
        keep: Path | None = None,
        on_disk: Callable[[], None] = lambda: None,
    ) -> None:
        """Save a snapshot of ``checkpoint`` to ``path`` in the background. The previous file stays
        as ``keep``, if given; ``on_disk`` is called once the new one is written."""
        if any(path == pending for pending, _ in self._behind):  # one pending write per file
            self.settle()
        content = snapshot(checkpoint)

        def write() -> None:
            if path.parent != self.paths.root:  # a root that was moved away is not made anew
                path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, content, keep)
            on_disk()

        self._write_behind(path, write)

    def _write_behind(self, path: Path, write: Callable[[], None]) -> None:
        while self._behind and self._behind[0][1].done():
            self._behind.popleft()[1].result()

        def work() -> None:
            if self._broken:  # no line of metrics without its checkpoint
                return
            self._broken = True
            with self._writing(path):
                write()
            self._broken = False

        self._behind.append((path, self._writer.submit(work)))

    def has_failed(self) -> bool:
        """Whether a background write has failed; ``settle`` raises its error."""
        return any(future.done() and future.exception() is not None for _, future in self._behind)

    def settle(self) -> None:
        """Wait for all background writes; raises the first error."""
        while self._behind:
            self._behind.popleft()[1].result()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """On any exit, finish all writes (or raise their error), close the events and unlock."""
        with contextlib.ExitStack() as last:  # called in reverse, each even if another fails
            if self._lock is not None:
                last.callback(self._lock.release)
            last.callback(self._close_events)
            last.callback(self.settle)
            yield

    def _close_events(self) -> None:
        if self._events is not None:
            with self._writing(self.paths.tensorboard):
                self._events.close()

    def drop(self, path: Path) -> None:
        """Remove an outdated file, or a folder with its content, if it exists."""
        self.settle()
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def write_picture(self, path: Path, figure: Figure) -> None:
        with self._writing(path):
            write_figure(path, figure)
            if self._events is not None:
                self._events.picture(path.stem, figure, self._epochs)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write {path} ({error.strerror or error}); what was saved before is intact"
            ) from error


def _locked(paths: RunPaths) -> FileLock:
    try:
        return locked(paths.lock, timeout=0)
    except Timeout:
        raise InputError(f"another process is training in {paths.root}") from None


def refuse_locked(paths: RunPaths) -> None:
    """Raise ``InputError`` if another process is training in the folder; writes nothing."""
    if paths.lock.exists():
        _locked(paths).release()


class SilentRunFolder(RunFolder):
    """The run folder of all processes but the first: prints and writes nothing."""

    writes = False

    def _nothing(self, *given: Any, **options: Any) -> None: ...

    write_json = say = append_epoch = rewrite_epochs = save = drop = write_picture = _nothing


def read_epochs(paths: RunPaths) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; ``InputError`` if it is missing or malformed."""
    rows = read_objects(paths.metrics)
    for number, row in enumerate(rows, 1):
        if wrong := misfit(row, _EPOCH):
            raise InputError(f"line {number} of {paths.metrics} is not of an epoch: {wrong}")
    return rows


def read_summary(paths: RunPaths) -> dict[str, Any]:
    """The content of ``summary.json``; ``InputError`` if it is missing (an unfinished run) or lacks
    an entry that is needed."""
    if not paths.summary.exists():
        raise InputError(
            f"{paths.root} is not the folder of a finished run: it has no {paths.summary.name}"
        )
    summary = read_object(paths.summary)
    shape: dict[str, Any] = {**_SUMMARY, "stage1?": (_DRAWN_HERE, {"pretrained": str}, None)}
    if summary.get("method") == "static":
        shape["settings"] = {"sparse_init": str}
    if wrong := misfit(summary, shape):
        raise InputError(
            f"{paths.summary} is not the summary of a run: {wrong}; without that file, --resume"
            " writes it anew"
        )
    return summary

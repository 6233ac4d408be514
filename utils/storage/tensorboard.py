"""TensorBoard events of a run: the values of ``metrics.jsonl`` by epoch, and the run's plots."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard panel of a value, by the end of its name.
_PANELS = {
    "_ra": "accuracy",
    "_sa": "accuracy",
    "loss": "loss",
    "seconds": "time",
    "images_per_second": "time",
}


def require_tensorboard() -> None:
    """Raise ``InputError`` if TensorBoard is not installed; only this module imports it."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the library tensorboard (pip install tensorboard): {error}"
        ) from error


def flattened(row: Mapping[str, Any]) -> dict[str, float | str]:
    """Flatten one line of ``metrics.jsonl`` into columns of a CSV or scalars of TensorBoard.

    ``layer_densities`` become ``density/<layer>``; ``updates`` become the counts ``updates``,
    ``updates/prune`` and ``updates/grow``; ``mask_distances`` become ``mask_distance``, measured
    to the previous epoch's mask, if there is one.
    """
    flat: dict[str, float | str] = {}
    for name, value in row.items():
        if name == "layer_densities":
            flat |= {f"density/{layer}": density for layer, density in value.items()}
        elif name == "updates":
            flat |= {
                "updates": len(value),
                **{f"updates/{kind}": sum(e[kind] for e in value) for kind in ("prune", "grow")},
            }
        elif name == "mask_distances":
            flat |= {"mask_distance": value[-1]} if value else {}
        else:
            flat[name] = int(value) if isinstance(value, bool) else value
    return flat


class Events:
    """Writes the events of one run; ``OSError`` if they cannot be written.

    The step is the epoch, from 1, counted across both stages of Robust Bird. A resumed run rewrites
    its past, so that no step appears twice and a run started without events gets all of them.

    Args:
        folder: created if missing; events of the run's earlier processes are replaced.
        rows: the epochs so far.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _quiet_writers()
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # purge_step tells a TensorBoard that has read the earlier file to forget it.
        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=0)
        self._epochs = 0
        for row in rows:
            self._add(row)
        self._writer.flush()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write the scalars of one more epoch through to the disk."""
        self._add(row)
        self._writer.flush()

    def picture(self, name: str, figure: Figure, epoch: int) -> None:
        """Write a plot as of ``epoch`` (from 1, counted across both stages)."""
        self._writer.add_figure(name, figure, epoch, close=False)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, row: Mapping[str, Any]) -> None:
        self._epochs += 1
        for name, value in flattened(row).items():
            if not isinstance(value, str):
                self._writer.add_scalar(_tag(name), value, self._epochs)


@functools.cache
def _quiet_writers() -> None:
    """Print no traceback for an ``OSError`` in the library's thread: it is raised again in ours,
    where it ends the run with one line."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        theirs = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (theirs and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook


def _tag(name: str) -> str:
    """Prefix a value's name with its panel."""
    if name in ("density", "updates"):  # beside the layers' densities and the kinds of updates
        return f"{name}/all"
    panel = next((panel for end, panel in _PANELS.items() if name.endswith(end)), "run")
    return name if "/" in name else f"{panel}/{name}"

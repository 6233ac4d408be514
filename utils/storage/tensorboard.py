"""A run's epochs for TensorBoard: every figure of ``metrics.jsonl`` by epoch, the density of each
layer, and the run's pictures."""

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

# In which panel of TensorBoard a figure stands, by the end of its name.
_PANELS = {
    "_ra": "accuracy",
    "_sa": "accuracy",
    "loss": "loss",
    "seconds": "time",
    "images_per_second": "time",
}


def require_tensorboard() -> None:
    """Raise ``InputError`` if the library is not there. It is imported nowhere else, so that
    nothing else needs it."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--tensorboard needs the library tensorboard (pip install tensorboard): {error}"
        ) from error


def flattened(row: Mapping[str, Any]) -> dict[str, float | str]:
    """One epoch's line of ``metrics.jsonl`` without nesting: the columns of a CSV, the scalars of
    TensorBoard.

    ``layer_densities`` become ``density/<layer>``; ``updates`` become the counts ``updates``,
    ``updates/prune`` and ``updates/grow``; of ``mask_distances`` stays ``mask_distance``, that to
    the mask of the epoch before, if there is one.
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
    """The events of one run in ``folder``; ``OSError`` where they cannot be written.

    The step is the epoch from 1, counted over both stages of Robust Bird. A run that goes on writes
    its past anew, so that no step is there twice, and a run that was begun without events has all
    of them too.

    Args:
        folder: made if it is not there; events of the run's earlier processes are replaced.
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
        """The scalars of one more epoch, on the disk when this returns."""
        self._add(row)
        self._writer.flush()

    def picture(self, name: str, figure: Figure, epoch: int) -> None:
        """An image as it is after an epoch, from 1 over both stages."""
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
    """An ``OSError`` in the library's own thread comes again in ours, where it ends the run: no
    traceback beside that line."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        theirs = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (theirs and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook


def _tag(name: str) -> str:
    """The figure's name with its panel before it."""
    if name in ("density", "updates"):  # beside the layers' densities and the kinds of updates
        return f"{name}/all"
    panel = next((panel for end, panel in _PANELS.items() if name.endswith(end)), "run")
    return name if "/" in name else f"{panel}/{name}"

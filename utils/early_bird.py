"""Detects that a ticket has emerged: masks of successive epochs hardly differ (You et al., "Drawing
Early-Bird Tickets", 2020).

The paper's Robust Bird draws its ticket in cheap standard training (docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("unstructured", "channel")
TOLERANCES = {"unstructured": 0.08, "channel": 0.1}


class EarlyBird:
    """Watches a network in training and says when its ticket has emerged.

    After each epoch it records a mask of the largest weights or scales. The ticket has emerged when
    ``window`` masks exist and the newest differs from each of the ``window - 1`` before it in at
    most ``tolerance`` of the positions. Bad arguments raise ``ValueError``.

    Args:
        density: kept fraction of the weights or channels, in (0, 1].
        window: masks compared, the newest included; at 1 the first mask is the ticket.
        tolerance: largest fraction of differing positions; by default the paper's for ``kind``.
        kind: ``unstructured`` ranks |w| of all convolutions together, ``channel`` |scale| of all
            batch norms.
    """

    def __init__(
        self,
        density: float,
        window: int = 5,
        tolerance: float | None = None,
        kind: str = "unstructured",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of ticket {kind!r}; known: {', '.join(KINDS)}")
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density is the kept fraction and must lie in (0, 1], not {density}")
        if window < 1:
            raise ValueError(f"the window counts masks and is at least 1, not {window}")
        tolerance = TOLERANCES[kind] if tolerance is None else tolerance
        if not 0.0 <= tolerance <= 1.0:
            raise ValueError(f"the tolerance is a fraction in [0, 1], not {tolerance}")
        self.density = density
        self.window = window
        self.tolerance = tolerance
        self.kind = kind
        # row e: the fraction of positions in which the mask of epoch e differs from those before
        self.distances: list[list[float]] = []
        self._masks: list[Tensor] = []  # one per epoch, eight positions per byte

    def observe(self, model: nn.Module) -> bool:
        """Record the network's mask after one more epoch; True if its ticket has emerged."""
        mask = ticket_mask(model, self.density, self.kind)
        packed = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
        differing = [np.bitwise_count((packed ^ one).numpy()).sum() for one in self._masks]
        self.distances.append([int(count) / mask.numel() for count in differing])
        self._masks.append(packed)
        return len(self._masks) >= self.window and all(
            distance <= self.tolerance for distance in self.recent()
        )

    def recent(self) -> list[float]:
        """Distances of the newest mask to the earlier ones in its window, as far as they exist."""
        return (
            self.distances[-1][-(self.window - 1) :] if self.distances and self.window > 1 else []
        )

    def state_dict(self) -> dict[str, Any]:
        """All masks and distances so far, as tensors and plain values. The masks are not copied:
        they never change."""
        return {"distances": [list(row) for row in self.distances], "masks": list(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.distances = [[float(d) for d in row] for row in state["distances"]]
        self._masks = list(state["masks"])


@torch.no_grad()
def ticket_mask(model: nn.Module, density: float, kind: str) -> Tensor:
    """The flat mask (bool, on the CPU) that keeps the largest ``density`` of the watched values.

    The threshold is the sorted score at ``int(n * (1 - density))``; scores strictly above it are
    kept. Raises ``ValueError`` for a network without layers of this ``kind``, or with weights that
    are not finite.
    """
    scores = torch.cat([score.detach().abs().reshape(-1) for score in _scores(model, kind)])
    if not scores.isfinite().all():
        raise ValueError("weights that are not finite have no ticket")
    threshold = scores.sort().values[min(int(scores.numel() * (1 - density)), scores.numel() - 1)]
    return (scores > threshold).cpu()


def _scores(model: nn.Module, kind: str) -> list[Tensor]:
    watched: type[nn.Module] = nn.modules.conv._ConvNd
    if kind == "channel":
        watched = nn.modules.batchnorm._BatchNorm
    found: list[Tensor] = [
        module.weight
        for module in model.modules()
        if isinstance(module, watched) and isinstance(module.weight, Tensor)
    ]
    if not found:
        raise ValueError(
            f"a network without {'batch norms' if kind == 'channel' else 'convolutions'} has no"
            f" {kind} ticket"
        )
    return found

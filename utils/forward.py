"""How a network is computed while it trains and is tested: in which precision, compiled or not, by how many processes.

bf16 is torch's autocast: convolutions and products in bfloat16; weights, batch-norm statistics, losses and masks in
float32. ``torch.compile`` fuses what lies between the convolutions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.distributed import ALONE, World

PRECISIONS = ("float32", "bf16")


def best_precision(device: torch.device) -> str:
    """``bf16`` where the hardware multiplies in it, else ``float32``."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return "bf16" if fast else "float32"


@dataclass(frozen=True)
class Execution:
    """How every network of a run is computed.

    Attributes:
        precision: one of ``PRECISIONS``.
        compile: whether networks are compiled.
        world: the processes that train together.
    """

    precision: str = "float32"
    compile: bool = False
    world: World = ALONE

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")


PLAIN = Execution()


class Forward:
    """Images to float32 logits through a network that stays what it is.

    Args:
        model: used as it is at each call: weights, mode and masks are its own.
        execution: how.
        sizes: images in the batches worth compiling for; others are computed without.
    """

    def __init__(self, model: nn.Module, execution: Execution = PLAIN, sizes: Collection[int] = ()) -> None:
        self.model = model
        self.world = execution.world
        self._autocast = execution.precision == "bf16"
        self._sizes = frozenset(sizes) if execution.compile else frozenset()
        self._compiled: dict[nn.Module, Any] = {}
        self._replica: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, C, H, W]``; other processes are not asked."""
        return self._logits(self.model, x)

    def averaged(self, x: Tensor) -> Tensor:
        """The same, with the parameters' gradients averaged over the processes in backward."""
        if self._replica is None:  # not before: DDP asks the other processes
            self._replica = self.world.replica(self.model, x.device)
        return self._logits(self._replica, x)

    def _logits(self, module: Any, x: Tensor) -> Tensor:
        if len(x) in self._sizes:
            if module not in self._compiled:
                self._compiled[module] = torch.compile(module, dynamic=False)
            module = self._compiled[module]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast):
            logits = module(x)
        return logits.to(x.dtype)

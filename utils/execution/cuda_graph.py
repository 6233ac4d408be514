"""A whole PGD attack as one CUDA graph: captured once for a batch size, then replayed without the
host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AttackOnce = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_WARM_UPS = 3  # libraries choose their kernels and allocate in these


class GraphMemory:
    """What graphs that never run at the same time share: a pool, and the stream of its blocks,
    which no other stream may reuse."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class GraphedAttack:
    """``attack_once`` on batches of one shape. Weights and statistics are read where they lie, so
    they may change in place.

    Args:
        model: whose statistics an attack in train mode moves; the capture leaves them as they are,
            also when it fails.
        attack_once: images, labels and draws to adversarial images, without a look at any value.
        x, y, draws: a first batch, on the GPU.
        shared: with the other graphs of one network.
    """

    def __init__(
        self,
        model: nn.Module,
        attack_once: AttackOnce,
        x: Tensor,
        y: Tensor,
        draws: Tensor | None,
        shared: GraphMemory,
    ) -> None:
        self._x, self._y = torch.empty_like(x).copy_(x), y.clone()
        self._draws = None if draws is None else draws.clone()
        before = [buffer.clone() for buffer in model.buffers()]
        stream = shared.stream
        stream.wait_stream(torch.cuda.current_stream(x.device))
        self._graph = torch.cuda.CUDAGraph()
        try:
            # which puts the usual stream back, whatever a failed capture leaves
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    attack_once(self._x, self._y, self._draws)
                with torch.cuda.graph(
                    self._graph, pool=shared.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self._adversarial = attack_once(self._x, self._y, self._draws)
            torch.cuda.current_stream(x.device).wait_stream(stream)
        finally:
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), before, strict=True):
                    buffer.copy_(value)

    def __call__(self, x: Tensor, y: Tensor, draws: Tensor | None) -> Tensor:
        """Adversarial images, in memory that the next call writes to."""
        self._x.copy_(x)
        self._y.copy_(y)
        if self._draws is not None and draws is not None:
            self._draws.copy_(draws)
        self._graph.replay()
        return self._adversarial

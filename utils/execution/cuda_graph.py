"""Attacks and updates as CUDA graphs: captured once per batch shape, replayed as a single launch.

A graph uses fixed memory addresses: weights and statistics may change in place between replays, and
inputs are copied into tensors of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.modes import preserved_buffers
from utils.errors import RunError, one_line
from utils.seeding import cpu_generator_states

AttackOnce = Callable[[Tensor, Tensor, Tensor | None], Tensor]
StepOnce = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
Inputs = tuple[Tensor, Tensor, Tensor | None]  # images, labels, draws
_WARM_UPS = 3  # in these, libraries choose kernels and allocate memory


class UncapturedError(Exception):
    """Raised before any capture if work cannot become a graph; it can still run without one."""


class GraphMemory:
    """The memory pool of graphs that never run at the same time, and the stream that owns its
    blocks, which no other stream may reuse."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Run work on the stream, between earlier and later work of the current stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            # restores the current stream even after a failed capture
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Captured:
    """A captured graph of ``work``, whose tensors must keep their addresses."""

    def __init__(self, work: Callable[[], Any], memory: GraphMemory) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"
        ):
            self.outputs = work()

    def replay(self) -> None:
        """Run the graph once more, into the same ``outputs``."""
        self._graph.replay()


def may_capture(device: torch.device) -> bool:
    """Whether the device supports CUDA graphs."""
    return device.type == "cuda"


def _capture(work: Callable[[], Any], memory: GraphMemory) -> Captured:
    """Capture ``work``; a failure leaves the allocator in an unknown state, so it ends the run."""
    try:
        return Captured(work, memory)
    except RuntimeError as error:
        raise RunError(
            f"a CUDA graph could not be captured ({one_line(error)[:200]}); nothing is lost:"
            " --resume --cuda_graphs off continues without"
        ) from error


class GraphedAttack:
    """``attack_once`` as a CUDA graph for batches of one shape.

    Args:
        model: the attacked network; its buffers, which an attack in train mode changes, are
            restored after the capture, even if it fails.
        attack_once: maps images, labels and draws to adversarial images, reading no values on the
            host.
        inputs: images, labels and draws of a first batch, on the GPU.
        memory: shared with the other graphs of the network.

    Raises:
        UncapturedError: not enough memory, or the network draws random numbers on the host.
        RunError: the capture failed.
    """

    def __init__(
        self, model: nn.Module, attack_once: AttackOnce, inputs: Inputs, memory: GraphMemory
    ) -> None:
        self._inputs = _own(inputs)
        work = functools.partial(attack_once, *self._inputs)
        with preserved_buffers(model), memory.beside():
            _warm_up(work)
            self._captured = _capture(work, memory)

    def __call__(self, *inputs: *Inputs) -> Tensor:
        """Adversarial images, in memory that the next call overwrites."""
        _fill(self._inputs, inputs)
        self._captured.replay()
        return self._captured.outputs


class GraphedStep:
    """A whole update (attack, forward, backward, optimizer) as a graph for batches of one shape.

    The first updates run eagerly on the graph's stream, which creates the optimizer's momentum and
    lets libraries choose kernels. Capturing runs nothing, so the graph is replayed right after it.

    Args:
        optimizer: SGD with one parameter group; its learning rate is read at each call.
        step_once: maps images, labels and draws to the loss, the number of correct predictions and
            the adversarial images.
        memory: shared with the other graphs of the network.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, step_once: StepOnce, memory: GraphMemory
    ) -> None:
        self._step_once, self._memory = step_once, memory
        (self._group,) = optimizer.param_groups
        self._done = 0
        self._captured: Captured | None = None
        self._gradients: list[Tensor | None] = []
        self._rate = torch.zeros((), device=memory.device)

    @property
    def is_captured(self) -> bool:
        return self._captured is not None

    def __call__(self, *inputs: *Inputs) -> tuple[Tensor, ...]:
        """Loss, number of correct predictions and adversarial images, whose memory the next call
        overwrites."""
        if self._captured is None and self._done < _WARM_UPS:
            self._done += 1
            with self._memory.beside(), self._own_rate():
                return self._step_once(*inputs)
        captured = self._captured or self._capture(inputs)
        _fill(self._inputs, inputs)
        self._rate.fill_(self._group["lr"])
        captured.replay()
        for parameter, gradient in zip(self._group["params"], self._gradients, strict=True):
            parameter.grad = gradient  # an eager step may have replaced it
        loss, right, attacked = captured.outputs
        return loss.clone(), right.clone(), attacked

    @contextlib.contextmanager
    def _own_rate(self) -> Iterator[None]:
        """The learning rate as the tensor that a graph reads. Eager steps round it alike."""
        rate = self._group["lr"]
        self._rate.fill_(rate)
        self._group["lr"] = self._rate
        try:
            yield
        finally:
            self._group["lr"] = rate

    def _capture(self, inputs: Inputs) -> Captured:
        self._inputs = _own(inputs)
        drawn = cpu_generator_states()
        with self._memory.beside(), self._own_rate():
            self._captured = _capture(lambda: self._step_once(*self._inputs), self._memory)
        if cpu_generator_states() != drawn:
            raise RunError(
                "the network draws on the host, which a CUDA graph would not repeat; --resume"
                " --cuda_graphs auto continues"
            )
        self._gradients = [parameter.grad for parameter in self._group["params"]]
        return self._captured


def _warm_up(work: Callable[[], object]) -> None:
    before = cpu_generator_states()
    try:
        for _ in range(_WARM_UPS):
            work()
    except torch.cuda.OutOfMemoryError as error:
        raise UncapturedError(one_line(error)[:200]) from error
    if cpu_generator_states() != before:
        raise UncapturedError("the network draws on the host, which a graph would not repeat")


def _own(inputs: Inputs) -> Inputs:
    x, y, draws = inputs
    return x.clone(), y.clone(), None if draws is None else draws.clone()


def _fill(own: Inputs, inputs: Inputs) -> None:
    for mine, value in zip(own, inputs, strict=True):
        if mine is not None and value is not None:
            mine.copy_(value)

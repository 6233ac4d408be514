"""Running networks in training and tests: precision, ``torch.compile``, CUDA graphs, DDP.

bf16 is torch's autocast: convolutions and matrix products in bfloat16; weights, batch-norm
statistics, losses and masks in float32. ``torch.compile`` fuses the operations between
convolutions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.modes import in_mode, preserved_buffers, without_parameter_gradients
from utils.attacks import PGD, pgd_attack
from utils.errors import RunError, one_line
from utils.execution import cuda_graph
from utils.execution.cuda_graph import (
    AttackOnce,
    GraphedAttack,
    GraphedStep,
    GraphMemory,
    Inputs,
    StepOnce,
    UncapturedError,
)
from utils.execution.distributed import ALONE, World
from utils.execution.hardware import PRECISIONS
from utils.seeding import preserved_generators


@dataclass(frozen=True)
class Execution:
    """How a run executes its networks.

    Attributes:
        precision: one of ``PRECISIONS``.
        compile: whether to compile networks; None compiles if the training is long enough.
        graphs: what a GPU captures as a CUDA graph: ``auto`` each attack, ``full`` each update
            with its attack, ``off`` nothing.
        world: the processes that train together.
    """

    precision: str = "float32"
    compile: bool | None = False
    graphs: str = "auto"
    world: World = ALONE

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}"
            )

    def for_training(self, flops: float, device: torch.device) -> Execution:
        """Return a copy with ``compile`` decided for a training of ``flops`` FLOPs."""
        if self.compile is not None:
            return self
        return dataclasses.replace(
            self, compile=flops >= _PAYS_TO_COMPILE.get(device.type, float("inf"))
        )


PLAIN = Execution()
# FLOPs of a training above which compiling pays. On a CPU (2 cores, 350 GFLOP/s) it takes 100 s and
# gains 5 %, so it pays after 40 minutes. The value for GPUs is an estimate, not measured.
_PAYS_TO_COMPILE = {"cpu": 1e15, "cuda": 1e17}


class Forward:
    """Executes a network: float32 logits, attacks and updates.

    Args:
        model: used with the weights, mode and masks that it has at each call.
        execution: precision, compilation, graphs and processes.
        sizes: batch sizes worth compiling and capturing for; others run eagerly.
        has_idle: whether some trained parameters may get no gradient in an update, which DDP must
            know.
    """

    def __init__(
        self,
        model: nn.Module,
        execution: Execution = PLAIN,
        sizes: Collection[int] = (),
        *,
        has_idle: bool = False,
    ) -> None:
        self.model = model
        self.world = execution.world
        self._has_idle = has_idle
        self._autocast = execution.precision == "bf16"
        self._graph_sizes = frozenset(sizes)
        self._sizes = self._graph_sizes if execution.compile else frozenset()
        self._wanted = execution.graphs
        self._attacks: dict[Hashable, GraphedAttack] = {}
        self._updates: dict[Hashable, GraphedStep] = {}
        self._is_capturing = False
        self._uncaptured: set[Hashable] = set()
        self._shared: GraphMemory | None = None
        self._compiled: Any = None
        self._replica: nn.Module | None = None
        self._notes: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, C, H, W]``; processes do not communicate."""
        return self._logits(self.model, x)

    def plainly(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of another network in the same precision, not compiled; no communication."""
        return self._logits(model, x)

    def reset(self) -> None:
        """Drop compiled code, graphs and the DDP replica, once the network has new tensors."""
        self._attacks, self._updates, self._uncaptured = {}, {}, set()
        if self._compiled is not None:
            torch.compiler.reset()
        self._compiled = self._replica = None

    def averaged(self, x: Tensor) -> Tensor:
        """Logits whose backward pass averages parameter gradients over the processes."""
        if self._replica is None:  # lazily, since creating DDP communicates
            self._replica = self.world.replica(self.model, x.device, self._has_idle)
        try:
            return self._logits(self._replica, x)
        except RuntimeError as error:
            if "finished reduction" not in str(error):
                raise
            part = (
                f"some layers took part in the last step in some of the {self.world.size} processes"
                " alone"
            )
            raise RunError(f"{part}; one process can train such a network") from error

    def attack(
        self, x: Tensor, y: Tensor, attack: PGD, *, training: bool, draws: Tensor | None
    ) -> Tensor:
        """``pgd_attack`` on this network, on CUDA as one graph for batches of ``sizes``."""

        def once(x: Tensor, y: Tensor, draws: Tensor | None) -> Tensor:
            return pgd_attack(
                self.model, x, y, attack, training=training, draws=draws, forward=self
            )

        if attack.steps == 0 or not self._is_graphed(x) or self._is_capturing:
            return once(x, y, draws)
        communicates = any(isinstance(m, nn.SyncBatchNorm) for m in self.model.modules())
        if training and communicates:
            return once(x, y, draws)  # collectives stay outside of graphs
        key = (attack, training, x.shape)
        if key not in self._attacks and key not in self._uncaptured:
            self._capture(key, once, (x, y, draws))
        return self._attacks[key](x, y, draws) if key in self._attacks else once(x, y, draws)

    def update(
        self,
        once: StepOnce,
        x: Tensor,
        y: Tensor,
        draws: Tensor | None,
        *,
        optimizer: torch.optim.Optimizer,
        key: Hashable,
    ) -> tuple[Tensor, ...]:
        """Run ``once(x, y, draws)``, an update by ``optimizer``; with ``full`` graphs, as one graph
        for batches of ``sizes``. ``key`` must identify whatever else ``once`` depends on."""
        if self._wanted != "full" or not self._is_graphed(x) or self.world.size > 1:
            return once(x, y, draws)
        whole = (key, x.shape)
        if whole not in self._updates:
            self._updates[whole] = GraphedStep(optimizer, once, self._memory(x.device))
        self._is_capturing = True  # the attack within becomes part of the graph
        try:
            return self._updates[whole](x, y, draws)
        finally:
            self._is_capturing = False

    def _is_graphed(self, x: Tensor) -> bool:
        graphed = self._wanted != "off" and len(x) in self._graph_sizes
        return graphed and cuda_graph.may_capture(x.device)

    def _memory(self, device: torch.device) -> GraphMemory:
        if self._shared is None:
            self._shared = GraphMemory(device)
        return self._shared

    def _capture(self, key: Hashable, once: AttackOnce, inputs: Inputs) -> None:
        device = inputs[0].device
        try:
            with preserved_generators(device):  # capturing must not change the step's draws
                self._attacks[key] = GraphedAttack(self.model, once, inputs, self._memory(device))
        except UncapturedError as error:
            self._uncaptured.add(key)
            note = f"warning: no CUDA graph of the attack ({error}); continuing without it"
            self._notes.append(note)

    @property
    def graphs(self) -> int:
        """Number of captured attacks and updates."""
        return len(self._attacks) + sum(step.is_captured for step in self._updates.values())

    def notes(self) -> list[str]:
        """Messages for the log since the last call."""
        told, self._notes = self._notes, []
        return told

    def prepare(self, x: Tensor, attacked: bool, training: bool, tested: int = 0) -> str:
        """Compile for training and tests, or fall back to eager execution; returns a log message.

        Args:
            x: images of a training batch.
            attacked: whether images are attacked in training and tests, which compiles more passes.
            training: whether the training attack runs in train mode.
            tested: batch size of tests; 0 if no test fills a batch.
        """
        start, failure = time.perf_counter(), None
        # compiled code of an earlier stage's network counts towards the same limit
        torch.compiler.reset()
        try:
            with preserved_generators(x.device), preserved_buffers(self.model):
                self._warm_up(x, attacked, training, tested)
        except Exception as error:
            # a missing compiler or an unsupported network: any layer below may raise its own error
            failure = one_line(error).split(". ")[0][:200]
        self.model.zero_grad()
        if self.world.highest(failure is not None):
            self._sizes = frozenset()
            return (
                f"warning: torch.compile failed ({failure or 'in another process'}); continuing"
                " without it"
            )
        return f"compiled in {time.perf_counter() - start:.0f} s"

    def _warm_up(self, x: Tensor, attacked: bool, training: bool, tested: int) -> None:
        if attacked:
            self._forward_backward_to_input(x, training)
        if self.world.size == 1:
            with in_mode(self.model, True):
                self(x).sum().backward()
        if tested in self._sizes:
            images = x[torch.arange(tested, device=x.device) % len(x)]
            with in_mode(self.model, False), torch.no_grad():
                self(images)
            if attacked:
                self._forward_backward_to_input(images, False)

    def _forward_backward_to_input(self, x: Tensor, training: bool) -> None:
        """The passes of one attack step: forward, and backward to the images."""
        with in_mode(self.model, training), without_parameter_gradients(self.model):
            self(x.detach().requires_grad_()).sum().backward()

    def _logits(self, module: Any, x: Tensor) -> Tensor:
        # DDP's pass is not compiled: if that failed in one process, the others would wait for its
        # gradients.
        if module is self.model and len(x) in self._sizes:
            # not "or", which asks a compiled network for its length, and few networks have one
            if self._compiled is None:
                self._compiled = torch.compile(module, dynamic=False)
            module = self._compiled
            # one channel has two equivalent strides, each of which would be compiled
            if x.shape[1] == 1:
                x = x.reshape(-1).view(x.shape)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast):
            logits = module(x)
        return logits.to(x.dtype)

"""Several processes of one run, started by ``torchrun``: who they are, and what they must agree on.

Each holds the whole network, its masks and all images. A step's batch is divided between them and
the gradients are averaged by torch's DistributedDataParallel, so all of them take the same
decisions; the first alone writes and speaks.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError, RunError, Stopped, one_line

# A process that ends is noticed at once; this is for one that hangs, or that decodes a large data
# set before the others.
_PATIENCE = datetime.timedelta(hours=1)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them. Alone, by default: then everything here
    costs and does nothing.

    Attributes:
        rank: of this process, from 0; the first one writes.
        size: how many there are.
        local_rank: of this process on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """What goes before a message that only this process can give."""
        return "" if self.size == 1 else f"process {self.rank} of {self.size}: "

    # ---- decisions

    def agree(self, work: Callable[[], T], *, in_turn: bool = False) -> T:
        """``work`` done by every process, or the same failure in all of them: ``InputError`` and
        the like in the first, which says it, and a silent ``Stopped`` in the others.

        Args:
            work: must not talk to the other processes itself.
            in_turn: the first of each machine goes first, so that what it downloads or decodes is
                there for the others.
        """
        if self.size == 1:
            return work()
        done: list[T] = []
        for first in (True, False) if in_turn else (self.local_rank == 0,):
            failure = None
            if first == (self.local_rank == 0):
                try:
                    done.append(work())
                except (
                    InputError,
                    RunError,
                    OSError,
                    MemoryError,
                    torch.OutOfMemoryError,
                ) as error:
                    failure = (isinstance(error, InputError), one_line(error))
            self._fail_together(failure)
        return done[0]

    def _fail_together(self, mine: tuple[bool, str] | None) -> None:
        """Raise the failure of the lowest rank that has one, if any has."""
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, mine)
        found = [(rank, *failure) for rank, failure in enumerate(failures) if failure is not None]
        if found:
            rank, is_input, text = found[0]
            text = text if rank == 0 else f"{World(rank, self.size).name}{text}"
            self.fail(InputError(text) if is_input else RunError(text))

    def fail(self, error: InputError | RunError) -> None:
        """End every process by an error that all of them have met at the same point; the first says
        it."""
        raise error if self.is_first else Stopped("", 2 if isinstance(error, InputError) else 3)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives the first process, in all of them."""
        if self.size == 1:
            return make()
        made = self.agree(lambda: [make()] if self.is_first else [])
        box: list[Any] = made or [None]
        dist.broadcast_object_list(box)
        return box[0]

    def highest(self, number: int) -> int:
        """The highest ``number`` that a process has."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def require_equal(self, number: int, what: str) -> None:
        """``RunError`` if the processes do not have the same ``number`` (a signed 64-bit one)."""
        if self.size == 1:
            return
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(numbers, torch.tensor([number]))
        if len({int(other) for other in numbers}) > 1:
            self.fail(RunError(f"{what} differ between the {self.size} processes"))

    # ---- tensors

    def total(self, values: Tensor) -> Tensor:
        """Summed over the processes, in place and on its device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def replica(self, model: nn.Module, device: torch.device, has_idle: bool = False) -> nn.Module:
        """The network as one whose gradients are averaged in backward; all start with the weights
        of the first. ``has_idle``: some parameters may have none, for which each step is
        searched."""
        if self.size == 1:
            return model
        parallel: Any = nn.parallel.DistributedDataParallel
        # Buffers are handed round by ``share_buffers``, after a step: an attack in eval mode needs
        # them before the next.
        names = ("forward_sync_buffers", "broadcast_buffers")  # since torch 2.13, and before
        name = next(name for name in names if name in inspect.signature(parallel).parameters)
        options = {name: False, "find_unused_parameters": has_idle}
        return parallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, **options
        )

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's batch-norm statistics, so that after each step all
        hold the same network."""
        if self.size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if buffers:
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, 0)
            parts = flat.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(
                buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
            )


ALONE = World()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes that ``torchrun`` started, or this one alone; raises ``RunError`` if they do
    not find each other."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield ALONE
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    _import_before_the_group()
    try:
        # Small things that the hosts decide go by gloo in any case: they never wait for a device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes do not find each other ({one_line(error)})") from error
    _release_group_at_exit()
    world = World(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        yield world
    except (Stopped, InputError, RunError) as ending:
        _leave(world, together=isinstance(ending, Stopped))
        raise
    except RuntimeError as error:
        if lost_another(error):
            raise RunError(f"{world.name}another process of this run has ended") from error
        raise
    finally:
        if not gpus or sys.exc_info()[0] is None:  # NCCL may wait for a process that will not come
            dist.destroy_process_group()


def _import_before_the_group() -> None:
    # DDP imports it, and it keeps the group of that moment as default arguments: here there is none
    # yet.
    importlib.import_module("torch.distributed.nn.functional")


def _release_group_at_exit() -> None:
    """See that the exchange's threads end before Python does: one that then still asks for the
    interpreter aborts the process.

    Who drops the group last waits for them, and of its holders the Python object alone lets them
    have the interpreter meanwhile; DDP's would wait for ever. So that one is held until DDP, and
    what holds it in cycles, is gone.
    """
    held = [dist.group.WORLD]

    def let_go() -> None:
        gc.collect()
        held.clear()

    atexit.register(let_go)


def _leave(world: World, together: bool) -> None:
    """torchrun kills what is left once a process has failed, and the first may still be writing: it
    leaves first."""
    store = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the store may be gone with its process
        if world.is_first:
            store.set("the first leaves", "1")
        elif together:
            store.wait(["the first leaves"], _PATIENCE)
            time.sleep(1.0)  # it still has its last line to say


def lost_another(error: RuntimeError) -> bool:
    """Whether a failed exchange says that another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "onnection", "Broken pipe")
    )


# ---------------------------------------------------------------- batch norm


def synchronize_batch_norm(model: nn.Module) -> None:
    """Make every batch norm one of torch's SyncBatchNorm, in place: statistics over the whole batch
    of all processes.

    Each stays what else it is, a ``BatchNorm2d``, say, whose channels can be removed.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)
    ]
    # torch's own batch norms go on to the next class, which is torch's too
    kinds = {
        kind: type(f"Sync{kind.__name__}", (kind, nn.SyncBatchNorm), {"process_group": None})
        for kind in {type(m) for m in norms}
    }
    for module in norms:
        module.__class__ = kinds[type(module)]

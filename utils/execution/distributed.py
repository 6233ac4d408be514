"""Data-parallel training: the processes of one run, started by ``torchrun``, and their agreement.

Each process holds the whole network, its masks and all images. Each batch is divided among them
and torch's DistributedDataParallel averages the gradients, so that all make the same decisions.
Only the first process writes files and prints.
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

# Timeout for a process that hangs, or decodes a large data set before the others. One that ends is
# noticed at once.
_PATIENCE = datetime.timedelta(hours=1)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen by one of them. By default there is only one, and no method
    communicates.

    Attributes:
        rank: rank of this process, from 0; only the first writes.
        size: number of processes.
        local_rank: rank of this process on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """Prefix of messages about this process; empty if there is only one."""
        return "" if self.size == 1 else f"process {self.rank} of {self.size}: "

    # ---- decisions

    def agree(self, work: Callable[[], T], *, in_turn: bool = False) -> T:
        """Run ``work`` in every process, and fail in all if it fails in any: the first raises
        ``InputError`` or ``RunError``, the others a silent ``Stopped``.

        Args:
            work: must not communicate with the other processes itself.
            in_turn: run it on the first process of each machine first, so that the others find
                what it has downloaded or decoded.
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
        """Raise the failure of the lowest rank that failed, if any did."""
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, mine)
        found = [(rank, *failure) for rank, failure in enumerate(failures) if failure is not None]
        if found:
            rank, is_input, text = found[0]
            text = text if rank == 0 else f"{World(rank, self.size).name}{text}"
            self.fail(InputError(text) if is_input else RunError(text))

    def fail(self, error: InputError | RunError) -> None:
        """End all processes on an error that they met at the same point; only the first reports
        it."""
        raise error if self.is_first else Stopped("", 2 if isinstance(error, InputError) else 3)

    def from_first(self, make: Callable[[], T]) -> T:
        """Run ``make`` in the first process and return its result in all."""
        if self.size == 1:
            return make()
        made = self.agree(lambda: [make()] if self.is_first else [])
        box: list[Any] = made or [None]
        dist.broadcast_object_list(box)
        return box[0]

    def highest(self, number: int) -> int:
        """The maximum of ``number`` over the processes."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def require_equal(self, number: int, what: str) -> None:
        """Raise ``RunError`` unless all processes have the same ``number`` (signed 64-bit)."""
        if self.size == 1:
            return
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(numbers, torch.tensor([number]))
        if len({int(other) for other in numbers}) > 1:
            self.fail(RunError(f"{what} differ between the {self.size} processes"))

    # ---- tensors

    def total(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the processes, in place and on their device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def replica(self, model: nn.Module, device: torch.device, has_idle: bool = False) -> nn.Module:
        """Wrap the network so that backward averages gradients over the processes; all start with
        the first one's weights. With ``has_idle``, each step searches for parameters that got no
        gradient."""
        if self.size == 1:
            return model
        parallel: Any = nn.parallel.DistributedDataParallel
        # ``share_buffers`` broadcasts buffers after each step. DDP would do so in its next forward
        # pass, too late for an attack in eval mode.
        names = ("forward_sync_buffers", "broadcast_buffers")  # since torch 2.13, and before
        name = next(name for name in names if name in inspect.signature(parallel).parameters)
        options = {name: False, "find_unused_parameters": has_idle}
        return parallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, **options
        )

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast the first process's batch-norm statistics, so that all hold the same network
        after each step."""
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
    """Join the processes that ``torchrun`` started, if it did; ``RunError`` if they cannot connect
    or if another one ends early."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield ALONE
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    # DDP imports this module, whose default arguments keep the group of that moment alive. Now
    # there is none yet.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        # Decisions made on the host always use gloo, so that they never wait for a device.
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
        if not gpus or sys.exc_info()[0] is None:  # else NCCL may wait for ever
            dist.destroy_process_group()


def _release_group_at_exit() -> None:
    """Make the group's threads end before Python does: one that still needs the GIL then aborts
    the process.

    Dropping the last reference to the group waits for its threads, and only the Python object
    releases the GIL meanwhile; DDP's reference would deadlock. So the Python object is held until
    DDP, and any cycle that holds it, is collected.
    """
    held = [dist.group.WORLD]
    atexit.register(held.clear)
    atexit.register(gc.collect)  # runs first: atexit calls in reverse


def _leave(world: World, together: bool) -> None:
    """Let the first process, which may still be writing, exit first: once one has failed, torchrun
    kills the others."""
    store = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the store may be gone with its process
        if world.is_first:
            store.set("the first leaves", "1")
        elif together:
            store.wait(["the first leaves"], _PATIENCE)
            time.sleep(1.0)  # for the first one's last message


def lost_another(error: RuntimeError) -> bool:
    """Whether an error in communication means that another process has ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "onnection", "Broken pipe")
    )


# ---------------------------------------------------------------- batch norm


def synchronize_batch_norm(model: nn.Module) -> None:
    """Turn every batch norm into a SyncBatchNorm in place, with statistics over the whole batch of
    all processes.

    Each also stays an instance of its own class, such as ``BatchNorm2d``.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)
    ]
    # torch's BatchNorm classes define no forward themselves, so SyncBatchNorm's is used
    kinds = {
        kind: type(f"Sync{kind.__name__}", (kind, nn.SyncBatchNorm), {"process_group": None})
        for kind in {type(m) for m in norms}
    }
    for module in norms:
        module.__class__ = kinds[type(module)]

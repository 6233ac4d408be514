"""Runs a function in several processes, as torchrun would, and collects the results."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.execution.distributed import joined


def in_processes(
    size: int, function: Callable[..., Any], folder: Path, *arguments: Any
) -> list[Any]:
    """Run ``function(world, *arguments)`` in ``size`` processes and return the results by rank.
    The processes save them in ``folder``."""
    spawn(_process, (size, free_port(), function, str(folder), arguments), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def spawn(
    function: Callable[..., Any], arguments: tuple[Any, ...], size: int = 2, seconds: float = 300
) -> None:
    """Run ``function(rank, *arguments)`` in ``size`` processes and wait until they end; raises
    ``TimeoutError`` after ``seconds``."""
    context = torch.multiprocessing.spawn(function, arguments, size, join=False)
    end = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the processes had not ended after {seconds:g} s")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _process(
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    folder: str,
    arguments: tuple[Any, ...],
) -> None:
    become(rank, port, size)
    with joined() as world:
        torch.save(function(world, *arguments), Path(folder) / f"{rank}.pt")


def become(rank: int, port: int, size: int = 2) -> None:
    """Give this process the environment that torchrun would set, and a single compute thread."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update(
        {name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1"
    )

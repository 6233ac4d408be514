"""Stateless randomness: every draw is a pure function of a key and a counter.

The draws are those of ``sparse_core``, the same on every device and in every batch split, so a
resumed run, a run in another number of processes and a run on a GPU all see the same. Global
generators are seeded only for code that knows no others, and restored afterwards.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_core import random_bits, stream, uniform

__all__ = [
    "cpu_generator_states",
    "permutation",
    "preserved_generators",
    "random_bits",
    "seeded",
    "stream",
    "uniform",
]


def permutation(n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of ``range(n)`` (int64)."""
    return torch.argsort(random_bits(key, torch.arange(n, device=device)), stable=True)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the CPU's global generators for code that knows no others (weight initialization), and
    restore them on exit."""
    with preserved_generators(torch.device("cpu")) as seed:
        seed(key)
        yield


@contextlib.contextmanager
def preserved_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Lend the global generators of torch (the CPU's and that of ``device``), numpy and Python to
    code that draws from them, such as dropout. Yields a function that seeds all of them with a key;
    on exit their states are restored.
    """
    # Not torch.manual_seed, which would also reseed the generators of all other GPUs.
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # creates the generators
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    others = np.random.get_state(), random.getstate()

    def seed(key: int) -> None:
        for generator in generators:
            generator.manual_seed(key)
        np.random.seed(key % 2**32)
        random.seed(key)

    try:
        yield seed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(others[0])
        random.setstate(others[1])


def cpu_generator_states() -> tuple[bytes, str, tuple[Any, ...]]:
    """The states of the CPU's global generators (torch's, numpy's and Python's), to tell whether
    something has drawn from one."""
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        repr(np.random.get_state()),
        random.getstate(),
    )

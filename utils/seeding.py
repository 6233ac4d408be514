"""Randomness without history: every draw is a pure function of a key and a counter.

The draws are those of ``sparse_core``, the same on every device and in every batch split, so a
resumed run, a run on another number of processes, and a run on a GPU all see the same. For code
that only knows global generators, those are lent states.
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
    "host_draws",
    "lent_generators",
    "permutation",
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
    """Give code that only knows the global generators (weight initialization) states of their own;
    those of GPUs are left alone."""
    with lent_generators(torch.device("cpu")) as seed:
        seed(key)
        yield


@contextlib.contextmanager
def lent_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Lend the global generators of torch (the CPU's and that of ``device``), numpy and Python to
    code that draws by them, such as
    dropout: what comes with it gives all of them states by a key, and afterwards they are as they
    were found.
    """
    # Not torch.manual_seed, which reseeds every GPU's generator of the host program too.
    generators = [torch.default_generator, *_of_gpu(device)]
    before = (
        [generator.get_state() for generator in generators],
        np.random.get_state(),
        random.getstate(),
    )

    def seed(key: int) -> None:
        for generator in generators:
            generator.manual_seed(key)
        np.random.seed(key % 2**32)
        random.seed(key)

    try:
        yield seed
    finally:
        for generator, state in zip(generators, before[0], strict=True):
            generator.set_state(state)
        np.random.set_state(before[1])
        random.setstate(before[2])


def host_draws() -> tuple[bytes, str, tuple[Any, ...]]:
    """The states of the CPU's global generators, to see whether something has drawn by one:
    torch's, numpy's and Python's."""
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        repr(np.random.get_state()),
        random.getstate(),
    )


def _of_gpu(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return []
    torch.cuda.init()  # before it there are none
    return [
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
    ]

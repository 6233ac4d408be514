"""Randomness without history: every draw is a pure function of a key and a counter.

A counter-based generator (the splitmix64 finalizer of Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) in torch's wrapping int64 arithmetic. The same key and
counter give the same bits on every device and in every batch split, so a resumed run, a run on
another number of processes, and a run on a GPU all see the same draws.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def stream(seed: int, *names: int | str) -> int:
    """A signed 64-bit key for one purpose, e.g. ``stream(seed, "order", epoch)``."""
    text = "/".join(str(part) for part in (seed, *names))
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def random_bits(key: int | Tensor, counter: Tensor) -> Tensor:
    """64 random bits for each ``counter`` (int64); ``key`` is a number or an int64 tensor that broadcasts."""
    bits = counter * _signed(_GOLDEN) + key
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    return bits ^ _shift_right(bits, 31)


def uniform(key: int | Tensor, counter: Tensor) -> Tensor:
    """Float32 draws strictly between 0 and 1, shaped like ``counter`` broadcast with ``key``."""
    # 23 bits and a half: with 24 the largest draw would round to 1.
    return (_shift_right(random_bits(key, counter), 41).to(torch.float32) + 0.5) * 2.0**-23


def permutation(n: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of ``range(n)`` (int64)."""
    return torch.argsort(random_bits(key, torch.arange(n, device=device)), stable=True)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Give code that only knows the global generators (weight initialization) states of their own; those of GPUs are left alone."""
    with lent_generators(torch.device("cpu")) as seed:
        seed(key)
        yield


@contextlib.contextmanager
def lent_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Lend the global generators of torch (the CPU's and that of ``device``), numpy and Python to code that draws by them, such as
    dropout: what comes with it gives all of them states by a key, and afterwards they are as they were found."""
    # Not torch.manual_seed, which reseeds every GPU's generator of the host program too.
    generators = [torch.default_generator, *_of_gpu(device)]
    before = [generator.get_state() for generator in generators], np.random.get_state(), random.getstate()

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
    """The states of the CPU's global generators, to see whether something has drawn by one: torch's, numpy's and Python's."""
    return torch.default_generator.get_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()


def _of_gpu(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return []
    torch.cuda.init()  # before it there are none
    return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]


def _shift_right(bits: Tensor, by: int) -> Tensor:
    # torch's >> copies the sign bit; a logical shift clears what it brought in.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

"""Precision and kernel settings for the hardware."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("float32", "bf16")
GRAPHS = ("auto", "off", "full")  # what a GPU captures (``utils.execution.forward``)


def best_precision(device: torch.device) -> str:
    """``bf16`` if the hardware multiplies in it natively, else ``float32``."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return "bf16" if fast else "float32"


def use_fast_kernels(device: torch.device) -> None:
    """On CUDA, choose the fastest convolution for each shape and allow TF32 for float32;
    ``full_precision`` suspends both."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, compute float32 without TF32 and with deterministic cuDNN kernels."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul

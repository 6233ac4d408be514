"""Choosing the device that a run computes on."""

from __future__ import annotations

import os

import torch

from utils.errors import InputError, require
from utils.execution.distributed import ALONE, World
from utils.execution.hardware import use_fast_kernels
from utils.settings.common import CommonSettings


def pick_device(settings: CommonSettings, world: World = ALONE) -> torch.device:
    """Choose the requested device and set up ``--deterministic``; ``InputError`` if this machine
    does not have it.

    Several processes on a machine get a GPU each.
    """
    device = _device(settings, world)
    # One process needs no synchronization, so a run trained on several GPUs can be resumed and
    # evaluated on a CPU.
    stored = settings.resume or settings.resume_dir is not None or getattr(settings, "eval", False)
    unable = settings.sync_bn and device.type == "cpu" and not (stored and world.size == 1)
    require(not unable, "--sync_bn is for GPUs: torch has no synchronized batch norm on a CPU")
    use_fast_kernels(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and generators use the current device
    if settings.deterministic:
        require(
            device.type == "cuda" or settings.resume_dir is not None,
            "--deterministic has no effect on a CPU, which always gives the same bits",
        )
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return device


def _device(settings: CommonSettings, world: World) -> torch.device:
    gpus = torch.cuda.device_count()
    require(
        world.size == 1 or settings.gpu is None,
        "--gpu has no effect with several processes, which take a GPU each",
    )
    if settings.device == "cpu" or (
        settings.device == "auto" and not gpus and settings.gpu is None
    ):
        return torch.device("cpu")
    if not gpus:
        asked = "--device cuda" if settings.device == "cuda" else f"--gpu {settings.gpu}"
        raise InputError(
            f"{asked}: torch sees no GPU on this machine; --device cpu trains without one"
        )
    number = world.local_rank if world.size > 1 else settings.gpu or 0
    if world.size > 1 and number >= gpus:
        raise InputError(
            f"torch sees {gpus} GPU(s) on this machine, and every process needs one; --device cpu"
            " trains without"
        )
    if not 0 <= number < gpus:
        raise InputError(f"--gpu {number}: torch sees {gpus} GPU(s), numbered from 0")
    return torch.device("cuda", number)

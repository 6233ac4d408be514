"""Checks of a custom network before it trains for hours: a step and a checkpoint, rehearsed on two
images.

Nothing is written, and the network and the global generators are left as they were found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data, plain_batches
from models import CUSTOM_ARCHITECTURES
from models.loading import build_network
from models.modes import in_mode, preserved_buffers
from sparse_core import depends_on
from utils.errors import InputError, RunError, one_line
from utils.evaluation.sanity import check_answers, close
from utils.execution.distributed import ALONE
from utils.execution.forward import Execution, Forward
from utils.execution.hardware import full_precision
from utils.seeding import cpu_generator_states, preserved_generators
from utils.storage.checkpoint import checksum, load_weights, network_weights, snapshot
from utils.storage.files import saved_bytes
from utils.storage.packing import compact, expand


@contextlib.contextmanager
def refusing(arch: str) -> Iterator[None]:
    """Turn failures of a network of ``CUSTOM_ARCHITECTURES`` into an ``InputError`` that names it.
    Those of other networks pass unchanged, and so do ``RunError``, I/O and memory errors."""
    try:
        yield
    except (RunError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except InputError as error:
        if arch not in CUSTOM_ARCHITECTURES or "--" in str(error):  # it already names a flag
            raise
        raise InputError(f"--arch {arch}: {error}") from error
    except Exception as error:
        if arch not in CUSTOM_ARCHITECTURES:
            raise
        raise InputError(
            f"--arch {arch} cannot be trained: {type(error).__name__}{_place(error)}:"
            f" {one_line(error)[:300]}"
        ) from error


def _place(error: Exception) -> str:
    """The innermost line of the traceback outside site-packages, usually in the user's code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    return f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def rehearse_step(model: nn.Module, data: Data, execution: Execution) -> tuple[list[str], bool]:
    """Run a forward and a backward pass in train mode, and check the logits in eval mode.

    Returns:
        The names of trained parameters without a gradient, and whether the network draws from a
        global generator of the CPU.

    Raises:
        InputError: output that is not logits or that ``check_answers`` refuses; no gradient at the
            images or at any parameter.
    """
    _warn_of_thawing(model)
    batch = next(plain_batches(data.train, 2))
    forward = Forward(
        model, dataclasses.replace(execution, compile=False, graphs="off", world=ALONE)
    )
    with preserved_generators(batch.x.device):
        before = cpu_generator_states()
        x = batch.x.detach().clone().requires_grad_()
        with preserved_buffers(model), in_mode(model, True):
            F.cross_entropy(_logits(forward, x, len(data.classes)), batch.y).backward()
        draws = cpu_generator_states() != before
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        model.zero_grad()
        with in_mode(model, False), torch.no_grad(), full_precision():
            _logits(forward, batch.x[:1], len(data.classes))
            check_answers(model, batch.x)
    if x.grad is None:
        raise InputError("the network passes no gradient to its images, so they cannot be attacked")
    if len(idle) == len(trained):
        raise InputError("none of the network's parameters can be trained")
    return idle, draws


def refuse_bound_copy(model: nn.Module, copied: nn.Module, data: Data) -> None:
    """Raise ``InputError`` if ``copied`` computes with weights of ``model``."""
    x = next(plain_batches(data.train, 2)).x
    with preserved_buffers(model), preserved_generators(x.device), in_mode(copied, False):
        bound = depends_on(copied(x), model)
    if bound:
        raise InputError(
            "a copy of the network computes with the original's weights, as its functions hold on"
            " to them (a lambda over self?), so weights cannot be averaged"
        )


def _warn_of_thawing(model: nn.Module) -> None:
    """Warn of parts in eval mode that training, which calls ``train()``, does not leave in it."""
    frozen = [(name, part) for name, part in model.named_modules() if not part.training]
    if not model.training or not frozen:
        return
    modes = [(part, part.training) for part in model.modules()]
    model.train()
    thawed = [name for name, part in frozen if part.training]
    for part, mode in modes:
        part.training = mode
    if thawed:
        warnings.warn(
            f"training puts {', '.join(thawed)} into train mode; override train() to keep parts in"
            " eval mode",
            stacklevel=3,
        )


def _logits(forward: Forward, x: Tensor, classes: int) -> Tensor:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if shape != [len(x), classes]:
            raise InputError(
                f"the network returns {shape} for {len(x)} images instead of logits [{len(x)},"
                f" {classes}]"
            )

    with forward.model.register_forward_hook(look):
        return forward(x)


def rehearse_checkpoint(
    model: nn.Module,
    states: Mapping[str, Any],
    spec: Mapping[str, Any],
    data: Data,
    device: torch.device,
    seed: int,
) -> None:
    """Write a checkpoint to memory and rebuild the network from it; the logits must be the same.

    Args:
        states: of the optimizer and the masks, as in a checkpoint.
        seed: of the run; the rebuilt network is initialized with another one, so that weights
            missing from the checkpoint show.

    Raises:
        InputError: the checkpoint lacks part of the network.
    """
    named = dict(model.named_parameters())
    momenta = {
        n: {"momentum_buffer": torch.zeros_like(p)}
        for n, p in enumerate(named.values())
        if p.requires_grad
    }
    content = snapshot(
        {
            "network": dict(spec),
            "state_dict": model.state_dict(),
            **states,
            "optimizer": {**states["optimizer"], "state": momenta},
        }
    )
    written = io.BytesIO(saved_bytes(compact(content, list(named))))
    stored = expand(torch.load(written, weights_only=True))
    if checksum(stored) != checksum(content):
        raise InputError("the network's checkpoint does not restore what was saved")
    other = build_network(spec, device, seed + 1)
    load_weights(other, network_weights(stored, "its checkpoint"), "its checkpoint", spec["arch"])
    x = next(plain_batches(data.train, 2)).x
    with (
        in_mode(model, False),
        in_mode(other, False),
        torch.no_grad(),
        full_precision(),
        preserved_generators(device),
    ):
        if not close(other(x), model(x)):
            raise InputError(
                "the network gives other logits once reloaded from its checkpoint: it keeps"
                " state outside its state_dict; register_buffer adds it"
            )

"""Context managers that change a network's mode and restore it, and its norms' statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode within the context; every submodule's own mode is restored afterwards.

    If the model already is in train mode, submodules that its owner put into eval mode, such as a
    frozen batch norm, stay in it.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restores buffers, such as batch-norm statistics, on exit."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)


@contextlib.contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context, no parameter requires a gradient: a compiled network would compute all
    of them, needed or not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of batch and instance norms by name, without their batch counters."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    own = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    named = model.named_buffers()
    return {name: buffer for name, buffer in named if id(buffer) in own and buffer.dim()}

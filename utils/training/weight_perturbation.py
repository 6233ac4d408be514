"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, NeurIPS 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from models.modes import preserved_buffers

_TINY = 1e-20  # from the authors' code: a layer whose gradient is zero is not moved


@contextlib.contextmanager
def perturbed_weights(
    model: nn.Module,
    gamma: float,
    loss: Callable[[], Tensor],
    masks: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, each layer is moved by ``gamma`` times its norm along the gradient of ``loss()``.

    On exit the weights are restored bit for bit, and the gradients are those computed inside. The
    ascent leaves the batch-norm statistics unchanged.

    Args:
        model: its trained parameters of two or more dimensions are moved, so no bias or norm.
        gamma: length of the move relative to the layer's norm; at 0 nothing is computed.
        loss: computes the training loss of a batch, with the gradients averaged over processes.
        masks: live positions by weight name; the others stay zero.
    """
    if gamma == 0:
        yield
        return
    model.zero_grad(set_to_none=True)
    with preserved_buffers(model):
        loss().backward()
    moved = [
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.grad is not None
    ]
    weights = [weight.detach() for _, weight in moved]
    directions = [weight.grad for _, weight in moved if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for (name, _), direction in zip(moved, directions, strict=True):
            if masks and name in masks:
                direction.mul_(masks[name])
        kept = [weight.clone() for weight in weights]
        lengths = torch._foreach_norm(weights)
        torch._foreach_mul_(lengths, gamma)
        torch._foreach_div_(lengths, torch._foreach_add(torch._foreach_norm(directions), _TINY))
        torch._foreach_add_(weights, torch._foreach_mul(directions, lengths))
    try:
        yield
    finally:
        torch._foreach_copy_(weights, kept)

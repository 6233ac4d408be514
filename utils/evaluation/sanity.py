"""What must hold of a network before a strong evaluation of it means anything (Carlini et al., "On
Evaluating Adversarial Robustness", 2019; the checks that AutoAttack and RobustBench make)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.modes import without_parameter_gradients
from utils.attacks import Loss, cross_entropy
from utils.errors import InputError

_ROUNDING = 1e-3  # relative; kernels for one image and for a batch round differently
LOOKED_AT = 32  # images, before a strong evaluation begins
SILENT_SHARE = 0.1  # of images without a gradient, from which the user is told


def check_network(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Look at a network as it will be evaluated, on some images ``[N, C, H, W]`` with labels
    ``[N]``; N is at least 2.

    Returns:
        Warnings, a line each.

    Raises:
        InputError: it answers with probabilities instead of logits, is not in eval mode, gives
            other answers the second time or beside other images, answers with numbers that are not
            finite, or has no gradient at any image.
    """
    if training := [
        name or "the network itself" for name, module in model.named_modules() if module.training
    ]:
        raise InputError(
            f"the network is not in eval mode: {training[0]} is training, so batch norm and dropout"
            " would mislead"
        )
    check_answers(model, x)
    return _look_at_gradients(model, x, y)


def check_answers(model: nn.Module, x: Tensor) -> None:
    """What ``check_network`` asks of a network's logits, which also holds of one that was never
    trained."""
    with torch.no_grad():
        logits, again, alone = model(x), model(x), model(x[:1])
    if not bool(logits.isfinite().all()):
        raise InputError("the network's logits are not finite")
    _refuse_probabilities(logits)
    if not close(again, logits):
        raise InputError(
            "the network is not deterministic: it answers differently the second time, and an"
            " attack needs one answer"
        )
    if not close(alone, logits[:1]):
        raise InputError(
            "the network's answer for an image depends on the images beside it, as with batch"
            " statistics"
        )


def _look_at_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    silent = images_without_gradient(model, x, y)
    if silent == len(x):
        raise InputError(
            f"the gradient is zero at all {silent} images looked at, so attacks by gradient say"
            " nothing"
        )
    if silent > SILENT_SHARE * len(x):
        return [
            f"the cross-entropy has no gradient at {silent} of {len(x)} images: PGD is weak there,"
            " see --eval_attack cw or autoattack"
        ]
    return []


def _refuse_probabilities(logits: Tensor) -> None:
    sums, log_sums = logits.sum(dim=1), logits.logsumexp(dim=1)
    if bool((logits >= 0).all() and (logits <= 1).all()) and close(sums, torch.ones_like(sums)):
        raise InputError(
            "the network gives probabilities and not logits: their softmax hides its gradients from"
            " attacks"
        )
    if bool((log_sums.abs() < 1e-4).all()):
        raise InputError(
            "the network gives log-probabilities and not logits; leave its last log_softmax out"
        )


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two answers differ by rounding alone."""
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max().clamp_min(1e-6))


def images_without_gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy
) -> int:
    """At how many of some images ``[N, C, H, W]`` with labels ``[N]`` a loss has no gradient, in
    the network's present mode.

    Raises:
        InputError: the network passes none on to its images, or one that is not finite.
    """
    x = x.detach().clone().requires_grad_()
    with without_parameter_gradients(model), torch.enable_grad():
        value = loss(model(x), y)
        if not value.requires_grad:
            raise InputError(
                "the network passes no gradient to its images, so attacks by gradient say nothing"
            )
        (gradient,) = torch.autograd.grad(value, x)
    if not bool(gradient.isfinite().all()):
        raise InputError(
            "the gradient at some images is not finite, so attacks by gradient say nothing"
        )
    return int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())

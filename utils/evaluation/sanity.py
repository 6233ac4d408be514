"""Checks that a network must pass for a strong evaluation to mean anything (Carlini et al., "On
Evaluating Adversarial Robustness", 2019); AutoAttack and RobustBench make them too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.modes import without_parameter_gradients
from utils.attacks import LOSSES
from utils.errors import InputError

_ROUNDING = 1e-3  # relative; kernels for one image and for a batch round differently
CHECKED_IMAGES = 32  # images checked before a strong evaluation
MAX_ZERO_GRADIENT_SHARE = 0.1  # share of images without a gradient above which the user is warned


def check_network(model: nn.Module, x: Tensor, y: Tensor, loss: str = "ce") -> list[str]:
    """Check a network, as it will be evaluated, on images ``[N, C, H, W]`` with labels ``[N]``,
    where N is at least 2; ``loss`` (of ``utils.attacks.LOSSES``) is what the attack ascends.

    Returns:
        Warnings, one line each.

    Raises:
        InputError: the network is not in eval mode, outputs (log-)probabilities instead of logits,
            is not deterministic, depends on the other images of a batch, or has logits or gradients
            that are not finite, or no gradient at any image.
    """
    if training := [
        name or "the network itself" for name, module in model.named_modules() if module.training
    ]:
        raise InputError(
            f"the network is not in eval mode: {training[0]} is training, so batch norm and dropout"
            " would mislead"
        )
    check_answers(model, x)
    return _check_gradients(model, x, y, loss)


def check_answers(model: nn.Module, x: Tensor) -> None:
    """The checks of ``check_network`` on the logits alone, which an untrained network passes too;
    raises ``InputError``."""
    with torch.no_grad():
        logits, again, alone = model(x), model(x), model(x[:1])
    if not bool(logits.isfinite().all()):
        raise InputError("the network's logits are not finite")
    _refuse_probabilities(logits)
    if not close(again, logits):
        raise InputError(
            "the network is not deterministic: a second pass gives other logits, and an attack"
            " needs one answer"
        )
    if not close(alone, logits[:1]):
        raise InputError(
            "the network's output for an image depends on the rest of its batch, as with batch"
            " statistics"
        )


def _check_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> list[str]:
    silent = images_without_gradient(model, x, y, loss)
    if silent == len(x):
        raise InputError(
            f"the gradient is zero at all {silent} images checked, so gradient-based attacks are"
            " meaningless"
        )
    if silent > MAX_ZERO_GRADIENT_SHARE * len(x):
        others = "cw or autoattack" if loss == "ce" else "autoattack"
        return [
            f"the attack's loss ({loss}) has no gradient at {silent} of {len(x)} images: PGD is"
            f" weak there, see --eval_attack {others}"
        ]
    return []


def _refuse_probabilities(logits: Tensor) -> None:
    sums, log_sums = logits.sum(dim=1), logits.logsumexp(dim=1)
    if bool((logits >= 0).all() and (logits <= 1).all()) and close(sums, torch.ones_like(sums)):
        raise InputError(
            "the network gives probabilities instead of logits: their softmax hides its"
            " gradients from attacks"
        )
    if bool((log_sums.abs() < 1e-4).all()):
        raise InputError(
            "the network gives log-probabilities instead of logits; remove its last log_softmax"
        )


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ only by rounding."""
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max().clamp_min(1e-6))


def images_without_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> int:
    """Count the images ``[N, C, H, W]`` with labels ``[N]`` at which a loss of
    ``utils.attacks.LOSSES`` has a zero gradient, in the network's current mode.

    Raises:
        InputError: the network passes no gradient to its images, or one that is not finite.
    """
    x = x.detach().requires_grad_()
    with without_parameter_gradients(model), torch.enable_grad():
        value = LOSSES[loss](model(x), y)
        if not value.requires_grad:
            raise InputError(
                "the network passes no gradient to its images, so gradient-based attacks are"
                " meaningless"
            )
        (gradient,) = torch.autograd.grad(value, x)
    if not bool(gradient.isfinite().all()):
        raise InputError(
            "the gradient at some images is not finite, so gradient-based attacks are meaningless"
        )
    return int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())

"""Projected gradient descent in pixel space (Madry et al., 2018) for linf and l2, and its one-step
variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modes import in_mode, without_parameter_gradients
from utils.seeding import random_bits, stream, uniform

NORMS = ("linf", "l2")
STARTS = ("uniform", "gaussian", "wide")
_GAUSSIAN = 1e-3  # standard deviation of the gaussian start, from TRADES' code
Loss = Callable[[Tensor, Tensor], Tensor]

_RANGE_TOLERANCE = 1e-3  # more than rounding, less than the 1/255 between pixel values
# networks whose images were found to be in [0, 1] at their first attack
_range_checked: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class PGD:
    """The settings of one attack, in pixel units of [0, 1]; bad ones raise ``ValueError``.

    Attributes:
        eps: radius of the ball.
        step_size: length of one step.
        steps: number of steps; with 0 the attack ends at its start.
        norm: ``linf`` or ``l2``.
        random_start: start at a random point instead of at the image.
        loss: ``ce`` (cross-entropy), ``margin`` (Carlini and Wagner's) or ``kl`` (divergence from
            the network's output for the clean images, as in TRADES), summed over the batch.
        start: the random start: ``uniform`` in the ball; ``gaussian``, 0.001 N(0, 1) around the
            image (TRADES); ``wide``, uniform in twice the radius, without projection to the ball
            afterwards (N-FGSM; linf only).
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    random_start: bool = True
    loss: str = "ce"
    start: str = "uniform"

    @property
    def is_one_step(self) -> bool:
        """Whether the attack is a single step that reaches the edge of the ball."""
        return self.steps == 1 and self.step_size >= self.eps > 0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r}; known: {', '.join(STARTS)}")
        if self.start == "wide" and (self.norm != "linf" or not self.random_start):
            raise ValueError("the wide start is random and in linf")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown attack loss {self.loss!r}; known: {', '.join(LOSSES)}")
        if self.eps < 0 or self.step_size < 0 or self.steps < 0:
            raise ValueError("eps, step_size and steps must not be negative")


@dataclass(frozen=True)
class AutoAttack:
    """The standard ensemble of Croce and Hein (2020). Its four attacks have no settings but the
    ball (``eps`` in pixel units of [0, 1])."""

    eps: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")


def fgsm_rs(eps: float) -> PGD:
    """One step of 1.25 eps from a uniform start, projected (Wong, Rice and Kolter, "Fast is better
    than free", 2020)."""
    return PGD(eps, 1.25 * eps, 1, "linf", random_start=True)


def n_fgsm(eps: float) -> PGD:
    """One step of eps from a uniform start in twice the radius, not projected (N-FGSM; de Jorge et
    al., "Make some noise", 2022)."""
    return PGD(eps, eps, 1, "linf", random_start=True, start="wide")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over the batch: an image's attack does not depend on the batch size."""
    return F.cross_entropy(logits, y, reduction="sum")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the true one, summed (Carlini and Wagner, 2017, without
    confidence)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    return (wrong - true).sum()


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p || q) per image, ``[N]``, with p from the logits ``reference`` and q from ``logits``."""
    p, q = reference.log_softmax(dim=1), logits.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "margin": margin,
    "kl": lambda logits, clean: kl_divergence(logits, clean).sum(),  # TRADES
}


def pgd_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    *,
    training: bool = False,
    draws: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """Adversarial images for ``x``.

    Args:
        model: maps images to logits. Parameters get no gradient, and their flags and the mode are
            restored. In train mode batch-norm statistics change, as in any forward pass.
        x: images ``[N, C, H, W]``, or inputs of any other shape ``[N, ...]``; floating, in [0, 1].
        y: labels ``[N]``, int64.
        training: craft in train mode (as the paper's training does) instead of eval mode.
        draws: from ``attack_draws``; required if and only if ``attack.random_start``.
        forward: computes the model's logits (``utils.execution.forward.Forward``); by default the
            model is called.
        targets: classes ``[N]``, int64, of a targeted attack, which descends their loss instead of
            ascending that of ``y``.

    Returns:
        Detached images like ``x``, in [0, 1] and within ``eps`` of it (from a ``wide`` start within
        ``2 eps + steps * step_size``).

    Raises:
        ValueError: draws that do not fit ``attack.random_start``; targets with the loss ``kl``,
            which uses no labels; a call under ``torch.inference_mode``, which records no gradients;
            images that are not floating, or not in [0, 1] at a network's first attack (later ones
            are not checked).
    """
    _refuse_odd_calls(x, attack, draws, targets)
    x = x.detach()
    _refuse_other_ranges(model, x)
    adversarial = x if draws is None else _start(x, draws, attack)
    loss_function, direction = LOSSES[attack.loss], 1 if targets is None else -1
    goal = y if targets is None else targets
    forward = model if forward is None else forward
    with in_mode(model, training), without_parameter_gradients(model), torch.enable_grad():
        if attack.loss == "kl":
            with torch.no_grad():
                goal = forward(x)
        for _ in range(attack.steps):
            adversarial = adversarial.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                loss_function(forward(adversarial), goal), adversarial
            )
            adversarial = _project(
                adversarial.detach() + direction * step(gradient, attack), x, attack
            )
    return adversarial.detach()


def _refuse_odd_calls(x: Tensor, attack: PGD, draws: Tensor | None, targets: Tensor | None) -> None:
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise ValueError(
            "pgd_attack needs gradients, which torch.inference_mode() does not record; call it"
            " outside, or use torch.no_grad()"
        )
    if attack.random_start != (draws is not None):
        raise ValueError("a random start needs draws, and draws need a random start")
    if attack.loss == "kl" and targets is not None:
        raise ValueError("the loss kl has no targets")


def _refuse_other_ranges(model: nn.Module, x: Tensor) -> None:
    """Check dtype and pixel range; the range only once per network, because that waits for the
    device, and never while a graph is compiled or captured."""
    advice = "divide 0..255 by 255, and let the model itself normalize"
    if not x.is_floating_point():
        raise ValueError(f"pgd_attack takes floating images in [0, 1], not {x.dtype}; {advice}")
    if torch.compiler.is_compiling() or model in _range_checked or not x.numel():
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(x.aminmax()).tolist()
    # also refuses NaN, for which no comparison holds
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise ValueError(
            f"pgd_attack takes images in [0, 1], and these are from {low:.4g} to {high:.4g};"
            f" {advice}"
        )
    _range_checked.add(model)


def attack_draws(
    attack: PGD, indices: Tensor, image_shape: torch.Size, *key: int | str
) -> Tensor | None:
    """Uniform draws in (0, 1) for the random start, float32: ``[N, *image_shape]`` for linf, flat
    with one more column for l2; None without a random start.

    A pure function of ``key`` (seed, purpose, epoch) and each image's index in its data set, so
    neither the batch size nor the number of processes changes an image's start.
    """
    if not attack.random_start:
        return None
    pixels = image_shape.numel() + (attack.norm == "l2")
    image_keys = random_bits(stream(0, *key), indices)[:, None]
    flat = uniform(image_keys, torch.arange(pixels, device=indices.device))
    return flat if attack.norm == "l2" else flat.view(-1, *image_shape)


def _start(x: Tensor, draws: Tensor, attack: PGD) -> Tensor:
    moved = x + _start_offset(draws, attack).view_as(x).to(x.dtype)
    return moved if attack.start == "wide" else _project(moved, x, attack)


def _start_offset(draws: Tensor, attack: PGD) -> Tensor:
    pixels = draws[:, :-1] if attack.norm == "l2" else draws
    if attack.start == "gaussian":
        return _GAUSSIAN * torch.special.ndtri(pixels.double())
    if attack.norm == "linf":
        return (2 * draws - 1) * (2 * attack.eps if attack.start == "wide" else attack.eps)
    # Uniform in the l2 ball: a Gaussian direction, and a radius whose d-th power is uniform.
    direction = torch.special.ndtri(pixels.double())
    radius = attack.eps * draws[:, -1:].double() ** (1 / direction.shape[1])
    return direction / direction.norm(dim=1, keepdim=True) * radius


def step(gradient: Tensor, attack: PGD) -> Tensor:
    """One step along a gradient ``[N, ...]``."""
    if attack.norm == "linf":
        return attack.step_size * gradient.sign()
    # An image without a gradient (a saturated loss) stays where it is instead of becoming NaN.
    norm = _image_norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    return attack.step_size * gradient / norm


def _project(candidate: Tensor, x: Tensor, attack: PGD) -> Tensor:
    if attack.start == "wide":
        return candidate.clamp(0.0, 1.0)
    if attack.norm == "linf":
        return torch.clamp(
            candidate, (x - attack.eps).clamp_min(0.0), (x + attack.eps).clamp_max(1.0)
        )
    # Pixel range first, ball second (advertorch's order): shrinking towards x cannot leave [0, 1]
    # again.
    offset = candidate.clamp(0.0, 1.0) - x
    scale = (attack.eps / _image_norm(offset).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
    return (x + offset * scale).clamp(0.0, 1.0)


def _image_norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)

"""The smallest linf perturbation that changes a network's prediction: FMN (Pintor et al., "Fast
minimum-norm adversarial attacks through adaptive norm constraints", 2021), with its settings
searched for each network as in the Adversarial Pruning Benchmark (HO-FMN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.modes import in_mode, without_parameter_gradients

# ranges searched: step size, in the l2 norm of an image's pixels, and momentum
_STEP_SIZES, _MOMENTA = (0.1, 30.0), (0.0, 0.95)
_GAMMAS = (0.05, 1e-3)  # change of the radius at the first and the last step
_LAST_STEP = 0.01  # length of the last step as a fraction of the first


@dataclass(frozen=True)
class FMN:
    """The settings of one attack; bad ones raise ``ValueError``.

    Attributes:
        steps: number of gradient steps.
        step_size: of the first step, in the l2 norm of an image's pixels; it falls as a cosine.
        momentum: of the normalized gradients.
    """

    steps: int = 200
    step_size: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.step_size <= 0 or not 0 <= self.momentum < 1:
            raise ValueError("FMN needs a step, a positive step size and a momentum in [0, 1)")


def minimum_norm(model: nn.Module, x: Tensor, y: Tensor, attack: FMN) -> tuple[Tensor, Tensor]:
    """Search for the smallest adversarial perturbations.

    Args:
        model: maps images to logits; attacked in eval mode, left as it was found.
        x: images ``[N, C, H, W]``, floating, in [0, 1].
        y: labels ``[N]``, int64.

    Returns:
        The misclassified images closest to ``x`` that were found (``x`` where none was), and their
        linf distances ``[N]``: 0 for images misclassified without an attack, inf where none was
        found.
    """
    x = x.detach()
    closest, distance = x.clone(), torch.full_like(x[:, 0, 0, 0], math.inf)
    offset, velocity = torch.zeros_like(x), torch.zeros_like(x)
    radius = torch.full_like(distance, math.inf)
    with in_mode(model, False), without_parameter_gradients(model), torch.enable_grad():
        for step in range(attack.steps + 1):
            lead, gradient = _lead(model, x + offset, y)
            size = _linf(offset)
            better = (lead <= 0) & (size < distance)
            closest = torch.where(_wide(better), x + offset, closest)
            distance = torch.where(better, size, distance)
            if step == attack.steps:
                break
            gamma = _cosine(*_GAMMAS, step, attack)
            radius = _next_radius(lead, gradient, size, radius, distance, gamma)
            velocity = attack.momentum * velocity + gradient / _wide(_norm(gradient, 2))
            alpha = attack.step_size * _cosine(1.0, _LAST_STEP, step, attack)
            limit = _wide(radius)
            offset = (offset - alpha * velocity).clamp(-limit, limit)
            offset = (x + offset).clamp(0.0, 1.0) - x
    return closest.detach(), distance


def _next_radius(
    lead: Tensor, gradient: Tensor, size: Tensor, radius: Tensor, best: Tensor, gamma: float
) -> Tensor:
    """The next radius ``[N]``: the linearized distance to the boundary until an image is first
    misclassified; from then on smaller while it is, larger while it is not."""
    to_boundary = size + lead / _norm(gradient, 1)
    wider = torch.where(best.isinf(), to_boundary, radius * (1 + gamma))
    return torch.where(lead <= 0, torch.minimum(radius * (1 - gamma), best), wider)


def _lead(model: nn.Module, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The lead of the true logit ``[N]``, which is minus the DLR loss (Croce and Hein, 2020), and
    its gradient at the images. It is positive where an image is classified correctly."""
    images = images.detach().requires_grad_()
    logits = model(images)
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -math.inf).amax(dim=1)
    lead = true - wrong
    if logits.shape[1] > 2:  # with two classes there is no third logit to scale by
        ordered = logits.topk(3, dim=1).values
        lead = lead / (ordered[:, 0] - ordered[:, 2] + 1e-12)
    (gradient,) = torch.autograd.grad(lead.sum(), images)
    return lead.detach(), gradient


def _cosine(first: float, last: float, step: int, attack: FMN) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * step / attack.steps)) / 2


def _linf(offset: Tensor) -> Tensor:
    return offset.flatten(1).abs().amax(dim=1)


def _norm(gradient: Tensor, order: int) -> Tensor:
    """Norms ``[N]``, never 0, so that an image without a gradient does not become NaN."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), ord=order, dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def tuned(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    trials: int = 32,
    steps: int = 100,
    on_trial: Callable[[], None] = lambda: None,
) -> FMN:
    """Search for the settings with the smallest median distance on correctly classified images.

    The benchmark searches by Bayesian optimization; here the trials are a Sobol sequence, which
    covers two dimensions evenly and is the same for every network.

    Args:
        model, x, y: as for ``minimum_norm``.
        seed: of the Sobol sequence.
        trials: number of settings tried.
        steps: of each trial, and of the settings returned.
        on_trial: called after each trial.
    """
    with torch.no_grad(), in_mode(model, False):
        right = model(x).argmax(dim=1) == y
    if right.any():  # the others are at distance 0 whatever the attack
        x, y = x[right], y[right]
    found: list[tuple[float, FMN]] = []
    for attack in _candidates(seed, trials, steps):
        _, distance = minimum_norm(model, x, y, attack)
        found.append((distance.median().item(), attack))
        on_trial()
    return min(found, key=lambda pair: pair[0])[1]


def _candidates(seed: int, trials: int, steps: int) -> Iterator[FMN]:
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(trials).tolist()
    low, high = map(math.log, _STEP_SIZES)
    for first, second in points:
        momentum = _MOMENTA[0] + second * (_MOMENTA[1] - _MOMENTA[0])
        yield FMN(steps, math.exp(low + first * (high - low)), momentum)

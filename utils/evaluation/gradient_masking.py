"""Signs of gradient masking: attacks that fail although the network is not robust (Athalye et al.,
"Obfuscated Gradients Give a False Sense of Security", 2018; Carlini et al., "On Evaluating
Adversarial Robustness", 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Split
from data.augment import to_float
from models.modes import in_mode, without_parameter_gradients
from utils.attacks import PGD, attack_draws, step
from utils.evaluation.trials import Trial, pgd_trials
from utils.execution.hardware import full_precision
from utils.seeding import random_bits, stream, uniform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (10, 20, 50, 100)
STEP_SIZES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # in units of eps
RADII = (0.5, 2.0, 4.0, 16.0)  # in units of eps
_SURFACE_IMAGES = 64
_SURFACE_POINTS = 9  # from the image to the surface of the ball
_TOLERANCE = 2.0  # points of RA, or two images, by which two attacks of one kind may differ
_LARGE_BALL_RA = 10.0  # percent of images that may withstand 16 eps; none should
_LOW_RISE = 0.5  # rise of the loss, relative to its linearization, below which it is too curved


@dataclass(frozen=True)
class Sign:
    """A question, its answer in figures, and whether that points to gradient masking."""

    question: str
    answer: str
    suspicious: bool


@dataclass(frozen=True)
class Signs:
    """All signs, and the mean loss ``surface[i][j]`` over images: i steps along the gradient and j
    along a random direction, from the image to the surface of the ball."""

    found: Sequence[Sign]
    surface: Sequence[Sequence[float]]


def trials(model: nn.Module, attack: PGD, seed: int) -> list[Trial]:
    """Trials with noise, one step, and PGD with other steps, step sizes and radii than ``attack``;
    each runs on every image."""
    eps, size = attack.eps, attack.step_size
    one_step = {"steps": 1, "step_size": eps, "random_start": False}
    changes: dict[str, dict[str, Any]] = {"one step": one_step}
    changes |= {f"PGD-{steps}": {"steps": steps} for steps in STEPS}
    changes |= {
        f"PGD-20, steps of {part:g} eps": {"steps": 20, "step_size": part * eps}
        for part in STEP_SIZES
    }
    changes |= {
        f"PGD-20 in {r:g} eps": {"steps": 20, "eps": r * eps, "step_size": r * size} for r in RADII
    }
    found = [
        trial
        for name, change in changes.items()
        for trial in pgd_trials(model, dataclasses.replace(attack, **change), seed, name=name)
    ]
    return [Trial("noise", lambda batch: _noise(batch, attack, seed)), *found]


def _noise(batch: Batch, attack: PGD, seed: int) -> Tensor:
    """Move images at random to the surface of the ball: the control without gradients."""
    draws = attack_draws(
        dataclasses.replace(attack, random_start=True),
        batch.indices,
        batch.x.shape[1:],
        seed,
        "noise",
    )
    assert draws is not None
    if attack.norm == "linf":
        direction = 2 * draws - 1
    else:
        direction = torch.special.ndtri(draws[:, :-1].double()).view_as(batch.x)
    offset = step(direction, dataclasses.replace(attack, step_size=attack.eps))
    return (batch.x + offset.to(batch.x.dtype)).clamp(0.0, 1.0)


def signs(
    model: nn.Module, split: Split, attack: PGD, seed: int, accuracies: Mapping[str, float]
) -> Signs:
    """Judge the accuracies (percent, by trial) and the loss around some images of the split."""
    clean, noise, pgd, most = (
        accuracies[name] for name in ("clean", "noise", "PGD-20", f"PGD-{STEPS[-1]}")
    )
    best_size = min(accuracies[f"PGD-20, steps of {part:g} eps"] for part in STEP_SIZES)
    widest = accuracies[f"PGD-20 in {RADII[-1]:g} eps"]
    surface, rise, rising = _surface(model, split, attack, seed)
    tolerance = max(_TOLERANCE, 200 / len(split))
    lost_to_noise, lost_to_pgd = clean - noise, clean - pgd
    last, rise_text = f"PGD-{STEPS[-1]}", f"by {100 * rise:.0f} % of its linear prediction"
    one_step = accuracies["one step"]
    found = [
        Sign(
            "does one step find more than many?",
            f"one step {one_step:.2f}, {last} {most:.2f}",
            one_step < most - 0.5 * tolerance,
        ),
        Sign(
            "do more steps keep finding more?",
            f"PGD-20 {pgd:.2f}, {last} {most:.2f}",
            pgd - most > tolerance,
        ),
        Sign(
            "does another step size find more?",
            f"PGD-20 {pgd:.2f}, best step size {best_size:.2f}",
            pgd - best_size > tolerance,
        ),
        Sign(
            "do many images survive a large ball?",
            f"{RADII[-1]:g} eps leaves {widest:.2f}",
            widest > _LARGE_BALL_RA,
        ),
        Sign(
            "is noise over half as strong as PGD?",
            f"noise takes {lost_to_noise:.2f} points, PGD-20 {lost_to_pgd:.2f}",
            lost_to_pgd > 0 and lost_to_noise > 0.5 * lost_to_pgd,
        ),
        Sign(
            "does the loss rise along the gradient?",
            f"{rise_text}, all the way for {100 * rising:.0f} % of the images",
            rise < _LOW_RISE,
        ),
    ]
    return Signs(found, surface.tolist())


def _surface(model: nn.Module, split: Split, attack: PGD, seed: int) -> tuple[Tensor, float, float]:
    """Mean loss ``[points, points]`` over some images; the median rise along the gradient, relative
    to the linearized loss; the share of images whose loss rises at every point on the way."""
    indices = split.spread(_SURFACE_IMAGES)
    x, y = to_float(split.rows(indices)), split.labels[indices]
    with in_mode(model, False), full_precision():
        x_free = x.clone().requires_grad_()
        with without_parameter_gradients(model), torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                F.cross_entropy(model(x_free), y, reduction="sum"), x_free
            )
        whole = dataclasses.replace(attack, step_size=attack.eps)  # to the surface of the ball
        keys = random_bits(stream(0, seed, "surface"), indices)[:, None]
        signed = uniform(keys, torch.arange(x[0].numel(), device=x.device)) - 0.5
        along, across = step(gradient, whole), step(signed.view_as(x), whole)
        parts = torch.linspace(0, 1, _SURFACE_POINTS).tolist()
        with torch.no_grad():
            # Images are not clipped to [0, 1], which would bend the surface.
            logits = [model(x + i * along + j * across) for i in parts for j in parts]
            losses = torch.stack([F.cross_entropy(found, y, reduction="none") for found in logits])
            losses = losses.unflatten(0, (_SURFACE_POINTS, _SURFACE_POINTS))
    way = losses[:, 0]  # [points, images]
    promised = (gradient * along).flatten(1).sum(dim=1)
    rise = ((way[-1] - way[0]) / promised.clamp_min(1e-12)).median().item()
    rising = (way.diff(dim=0) >= -1e-6).all(dim=0).double().mean().item()
    return losses.mean(dim=2).double().cpu(), rise, rising


def text(signs: Signs) -> list[str]:
    """The signs as lines for the terminal, with a verdict."""
    lines = [
        f"{'SUSPICIOUS' if sign.suspicious else 'fine':<10}  {sign.question:<40}  {sign.answer}"
        for sign in signs.found
    ]
    count = sum(sign.suspicious for sign in signs.found)
    verdict = (
        "no sign of gradient masking; AutoAttack (--eval_attack autoattack) is the stronger test"
    )
    if count:
        verdict = (
            f"{count} of {len(lines)} signs point to gradient masking or to an attack that is"
            " too weak: do not trust its RA"
        )
    return [*lines, verdict]


def figure(attack: PGD, accuracies: Mapping[str, float], signs: Signs) -> Figure:
    """RA against steps, step size and radius, with clean images and noise as controls, and the loss
    around the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (by_steps, by_size), (by_radius, surface) = figure.subplots(2, 2)
    names = {steps: f"PGD-{steps}" for steps in STEPS}
    _curve(
        by_steps,
        {1: accuracies["one step"], **{s: accuracies[n] for s, n in names.items()}},
        "steps (1: one step of eps)",
        log=True,
    )
    _curve(
        by_size,
        {part: accuracies[f"PGD-20, steps of {part:g} eps"] for part in STEP_SIZES},
        "step size / eps",
        log=True,
    )
    radii = {
        0.0: accuracies["clean"],
        1.0: accuracies["PGD-20"],
        **{r: accuracies[f"PGD-20 in {r:g} eps"] for r in RADII},
    }
    _curve(
        by_radius,
        dict(sorted(radii.items())),
        f"radius / eps (eps = {attack.eps * 255:g}/255)",
        log=False,
    )
    for axes in (by_steps, by_size):
        axes.axhline(
            accuracies["noise"], color="tab:orange", linewidth=4.0, alpha=0.4, label="random noise"
        )
        axes.axhline(accuracies["clean"], color="tab:green", linestyle=":", label="clean")
        axes.set_ylim(0, 1.3 * max(accuracies["clean"], 1.0))  # room for the legend
        axes.legend(frameon=False, loc="upper right", ncols=3)
    image = surface.imshow(signs.surface, origin="lower", extent=(0, 1, 0, 1), cmap="viridis")
    surface.set(
        xlabel="random signs / eps",
        ylabel="sign of the gradient / eps",
        title="mean loss around the images",
    )
    figure.colorbar(image, ax=surface, label="cross-entropy")
    return figure


def _curve(axes: Any, points: Mapping[float, float], label: str, *, log: bool) -> None:
    axes.plot(list(points), list(points.values()), marker="o", color="tab:blue", label="attacked")
    if log:
        axes.set_xscale("log")
        axes.set_xticks(list(points), [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in points])
        axes.minorticks_off()
    axes.set(xlabel=label, ylabel="accuracy (%)")
    axes.grid(alpha=0.25)

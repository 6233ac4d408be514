"""Strong evaluation: runs several attacks and records the prediction for each image, so an
interrupted evaluation can resume.

An evaluation is a list of trials. Each shows the network the images of a split after one attack;
a worst-case trial only attacks images that are still classified correctly after earlier trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch, Split
from data.augment import to_float
from models.modes import in_mode
from utils.attacks import PGD, AutoAttack, attack_draws, pgd_attack
from utils.errors import InputError
from utils.execution.distributed import ALONE, World
from utils.execution.hardware import full_precision

EVAL_BATCH = 256  # fixed, so a saved model scores the same whatever batch size it was trained with
_AUTOATTACK_CLASSES = 4
# An interruption loses the current batch, which under AutoAttack is thousands of passes: on a CPU
# an hour for 256 images and a ResNet-18.
_AUTOATTACK_BATCH = {"cpu": 32}

Craft = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Trial:
    """One pass over the images of a split, clean or attacked.

    Attributes:
        name: unique within an evaluation.
        craft: maps a batch to the images ``[N, C, H, W]`` that the network is shown.
        part: name of the split.
        spares: names of earlier trials; an image misclassified in one of them is skipped and
            counts as wrong.
        batch: images per batch.
    """

    name: str
    craft: Craft
    part: str = "test"
    spares: tuple[str, ...] = ()
    batch: int = EVAL_BATCH


class Outcomes:
    """The predicted class of every image in every trial; an interrupted evaluation resumes from it.
    ``labels`` are the true classes by split, int64 ``[N]`` on the CPU."""

    NOT_SHOWN = -1

    def __init__(self, labels: Mapping[str, Tensor]) -> None:
        self.labels = labels
        self._predicted: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}

    def predicted(self, trial: Trial) -> Tensor:
        """Predicted classes, int16 ``[N]`` in the order of the split; ``NOT_SHOWN`` for images the
        trial has not reached."""
        if trial.name not in self._predicted:
            self._predicted[trial.name] = torch.full_like(
                self.labels[trial.part], self.NOT_SHOWN, dtype=torch.int16
            )
        return self._predicted[trial.name]

    def right(self, trial: Trial) -> Tensor:
        """Bool ``[N]``: shown and classified correctly."""
        return self.predicted(trial) == self.labels[trial.part]

    def accuracy(self, trial: Trial) -> float:
        """Percent of all images of the split; the worst case so far for a trial that spares
        images."""
        return 100.0 * self.right(trial).double().mean().item()

    def rows(self, trial: Trial, trials: Sequence[Trial]) -> Tensor:
        """Positions in the split of the images that the trial does not skip, int64."""
        alive = torch.ones_like(self.labels[trial.part], dtype=torch.bool)
        for earlier in trials:
            if earlier.name in trial.spares:
                alive &= self.right(earlier)
        return alive.nonzero().squeeze(1)

    def estimate(self, trial: Trial, rows: Tensor) -> float:
        """Accuracy in percent so far: over the images shown, or an upper bound if the trial spares
        images."""
        shown = self.predicted(trial)[rows] != self.NOT_SHOWN
        wrong = int((shown & ~self.right(trial)[rows]).sum())
        if trial.spares:
            return 100.0 * (len(rows) - wrong) / len(self.labels[trial.part])
        return 100.0 * (1 - wrong / max(1, int(shown.sum())))

    def batches_done(self, trial: Trial) -> int:
        return self._batches.get(trial.name, 0)

    def add(self, trial: Trial, rows: Tensor, predicted: Tensor, batches: int) -> None:
        """Record the predictions (int16) for ``rows``, made in ``batches`` batches."""
        self.predicted(trial)[rows] = predicted
        self._batches[trial.name] = self.batches_done(trial) + batches

    def state_dict(self) -> dict[str, Any]:
        return {"predicted": dict(self._predicted), "batches": dict(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._predicted = {
            name: predicted.clone() for name, predicted in state["predicted"].items()
        }
        self._batches = {name: int(count) for name, count in state["batches"].items()}


OnRound = Callable[[Trial, int], None]


def run_trials(
    model: nn.Module,
    splits: Mapping[str, Split],
    trials: Sequence[Trial],
    outcomes: Outcomes | None = None,
    *,
    world: World = ALONE,
    on_round: OnRound = lambda trial, images: None,
) -> Outcomes:
    """Run all trials in eval mode and full float32, resuming from ``outcomes``; the network's modes
    are left as found.

    Batch boundaries do not depend on interruptions, and random draws depend only on the image or
    the batch, so a resumed evaluation gives the results of an uninterrupted one.

    Args:
        splits: by the names that trials use as ``part``.
        world: processes that share the batches; all of them end with the whole result.
        on_round: called with the trial and the number of images after each batch, or each round of
            batches of several processes; may raise to stop.
    """
    outcomes = (
        Outcomes({name: split.labels[split.indices].cpu() for name, split in splits.items()})
        if outcomes is None
        else outcomes
    )
    with in_mode(model, False), full_precision():
        for trial in trials:
            split = splits[trial.part]
            chunks = outcomes.rows(trial, trials).split(trial.batch)
            for first in range(outcomes.batches_done(trial), len(chunks), world.size):
                mine = chunks[first : first + world.size]
                rows = torch.cat(mine)
                answers = torch.zeros(len(rows), dtype=torch.int32, device=split.device)
                if world.rank < len(mine):
                    start = sum(len(chunk) for chunk in mine[: world.rank])
                    answers[start : start + len(mine[world.rank])] = _answers(
                        model, split, trial, mine[world.rank]
                    )
                outcomes.add(trial, rows, world.total(answers).to("cpu", torch.int16), len(mine))
                on_round(trial, len(rows))
    return outcomes


def answers_of(logits: Tensor) -> Tensor:
    """The classes of logits ``[N, classes]``, int64 ``[N]``; -2, which is none, where any is NaN,
    since ``argmax`` would answer with the first NaN's class."""
    return logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -2)


def _answers(model: nn.Module, split: Split, trial: Trial, rows: Tensor) -> Tensor:
    indices = split.indices[rows.to(split.device)]
    batch = Batch(to_float(split.rows(indices)), split.labels[indices], indices)
    shown = trial.craft(batch)
    with torch.no_grad():
        return answers_of(model(shown)).int()


# ---------------------------------------------------------------- trials


def clean_trial() -> Trial:
    """The trial on clean test images."""
    return Trial("clean", lambda batch: batch.x)


def pgd_trials(
    model: nn.Module,
    attack: PGD,
    seed: int,
    *,
    restarts: int = 1,
    part: str = "test",
    name: str = "pgd",
    source: nn.Module | None = None,
) -> list[Trial]:
    """PGD with ``restarts`` random starts, which find the worst case for each image.

    The first start is the one of ``evaluate``; later ones only attack images that withstood all
    earlier ones. Raises ``ValueError`` for restarts without a random start.

    Args:
        source: the network on which the images are crafted, if not ``model`` itself.
    """
    if restarts > 1 and not attack.random_start:
        raise ValueError("restarts need a random start: without one they are all the same")
    crafting = model if source is None else source

    def craft(key: tuple[int | str, ...]) -> Craft:
        def adversarial(batch: Batch) -> Tensor:
            draws = attack_draws(attack, batch.indices, batch.x.shape[1:], *key)
            return pgd_attack(crafting, batch.x, batch.y, attack, draws=draws)

        return adversarial

    base = name if part == "test" else f"{name}, {part}"
    names = [base, *(f"{base}, start {number + 1}" for number in range(1, restarts))]
    keys: list[tuple[int | str, ...]] = [
        (seed, "evaluate"),
        *((seed, "evaluate", number) for number in range(1, restarts)),
    ]
    return [Trial(names[n], craft(keys[n]), part, spares=tuple(names[:n])) for n in range(restarts)]


def autoattack_trials(
    model: nn.Module, attack: PGD | AutoAttack, classes: int, device: torch.device, seed: int
) -> list[Trial]:
    """The standard AutoAttack (Croce and Hein, 2020) within ``attack``'s ball, by pyautoattack: its
    four attacks in sequence, each on the images that withstood all earlier ones. They must follow
    ``clean_trial()``.

    Raises:
        InputError: there are fewer than the four classes that its targeted loss needs.
    """
    from pyautoattack import AutoAttack as Library

    if classes < _AUTOATTACK_CLASSES:
        raise InputError(
            f"AutoAttack's targeted losses need at least {_AUTOATTACK_CLASSES} classes and the"
            f" network has {classes}"
        )
    norm = {"linf": "Linf", "l2": "L2"}[attack.norm]
    library = Library(
        model, norm=norm, eps=attack.eps, version="standard", seed=seed, device=device
    )
    library.fab.targeted, library.fab.n_restarts = True, 1
    # Its default of nine target classes assumes ten classes.
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, classes - 1)
    attacks = {
        "apgd-ce": library.apgd,
        "apgd-t": library.apgd_targeted,
        "fab-t": library.fab,
        "square": library.square,
    }

    def craft(part: Any) -> Craft:
        def adversarial(batch: Batch) -> Tensor:
            # the library seeds torch's global generators, of all GPUs
            gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
            with torch.random.fork_rng(gpus):
                found = part.perturb(batch.x.contiguous(), batch.y).detach()
            # Rounding in its last step must not move an image out of the ball.
            if attack.norm == "linf":
                found = torch.clamp(found, batch.x - attack.eps, batch.x + attack.eps)
            return found.clamp(0.0, 1.0)

        return adversarial

    size = _AUTOATTACK_BATCH.get(device.type, EVAL_BATCH)
    names = ["clean", *attacks]
    return [
        Trial(name, craft(part), spares=tuple(names[: n + 1]), batch=size)
        for n, (name, part) in enumerate(attacks.items())
    ]

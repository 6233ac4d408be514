"""Guard against catastrophic overfitting in training with one-step attacks.

An overfitted network withstands only the one-step attack: its accuracy under PGD falls to nothing
within an epoch (Wong, Rice and Kolter, 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from data import Data
from utils.attacks import PGD
from utils.evaluation.scores import score
from utils.execution.forward import Forward

_IMAGES = 256  # validation images per measurement
_CHECKS_PER_EPOCH = 4  # measurements per epoch
_SHRINK = 0.75  # factor on the step size per rollback
MOST_ROLLBACKS = 8  # the step is then a tenth
_ABOVE_CHANCE = 1.5  # accuracy, in multiples of chance, that shows something learned
_GAP = 5.0  # points between the two accuracies that so few images can tell from noise


class CollapseError(Exception):
    """Catastrophic overfitting: the message gives the accuracies; training may roll back."""


Warn = Callable[[CollapseError], None]


@dataclass(frozen=True)
class Measurement:
    """Accuracies in percent on some validation images, under PGD-10 and the one-step attack."""

    pgd: float
    one_step: float


class CollapseGuard:
    """Compares accuracy under PGD-10 and the training attack about four times an epoch.

    Attributes:
        attack: the current one-step attack; each rollback shortens its step.
        last: the latest measurement; None before the first.
    """

    def __init__(self, attack: PGD, data: Data, seed: int) -> None:
        self._first, self._seed = attack, seed
        self._images = data.val.subset(data.val.spread(_IMAGES))
        self._chance = 100 / len(data.classes)
        self._pgd = PGD(attack.eps, attack.eps / 4, 10, attack.norm)
        self._best = Measurement(0.0, 0.0)
        self.last: Measurement | None = None
        self.rollbacks = 0
        self._has_warned = False

    @property
    def attack(self) -> PGD:
        return replace(self._first, step_size=self._first.step_size * _SHRINK**self.rollbacks)

    def after_step(
        self, forward: Forward, epoch: int, step: int, steps: int, warn: Warn | None
    ) -> None:
        """Check if that is due after ``step`` (from 1) of an ``epoch`` (from 0) of ``steps``; a
        collapse raises ``CollapseError``, or is passed to ``warn``, the first one only."""
        if step != steps and step % max(1, steps // _CHECKS_PER_EPOCH):
            return
        try:
            self.check(forward, f"epoch {epoch + 1}, step {step} of {steps}")
        except CollapseError as error:
            if warn is None:
                raise
            if not self._has_warned:
                warn(error)
            self._has_warned = True

    def check(self, forward: Forward, where: str) -> None:
        """Measure; raise ``CollapseError`` if accuracy under PGD has fallen below half of its best,
        or of chance, while the network withstands the one-step attack. Chance counts because a
        strong one-step attack overfits before the network resists anything, and guessing resists
        every attack. ``where`` names the step in the message."""
        pgd, one_step = (
            score(forward, self._images, attack, seed=self._seed).accuracy
            for attack in (self._pgd, self.attack)
        )
        self.last, best = Measurement(pgd, one_step), self._best
        self._best = Measurement(max(best.pgd, pgd), max(best.one_step, one_step))
        learned = _ABOVE_CHANCE * self._chance
        fell = best.pgd >= learned
        stays = one_step > max(best.one_step / 2, 2 * pgd, pgd + _GAP, learned)
        if stays and pgd < (best.pgd if fell else self._chance) / 2:
            change = f"fell from {best.pgd:.1f} to {pgd:.1f} %" if fell else f"is {pgd:.1f} %"
            raise CollapseError(
                f"catastrophic overfitting in {where}: accuracy under PGD-10 {change} on"
                f" {len(self._images)} validation images, and is {one_step:.1f} % under the"
                " one-step attack in training"
            )

    def figures(self) -> dict[str, float]:
        """The latest measurement for ``metrics.jsonl``, in percent; step sizes in 1/255."""
        if self.last is None:
            return {}
        size = {"step_size": 255 * self.attack.step_size} if self.rollbacks else {}
        return {"guard_ra": self.last.pgd, "guard_one_step_ra": self.last.one_step, **size}

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": [self._best.pgd, self._best.one_step],
            "last": [self.last.pgd, self.last.one_step] if self.last else None,
            "rollbacks": self.rollbacks,
            "has_warned": self._has_warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = Measurement(*map(float, state["best"]))
        self.last = Measurement(*map(float, state["last"])) if state["last"] else None
        self.rollbacks = int(state["rollbacks"])
        self._has_warned = bool(state.get("has_warned", False))

"""Guard against catastrophic overfitting of training by one-step attacks.

The network then withstands the one step alone, and its accuracy under PGD falls to nothing within
an epoch (Wong, Rice and Kolter, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data import Data
from utils.attacks import PGD
from utils.evaluation.scores import score
from utils.execution.forward import Forward

_IMAGES = 256  # of validation, for each look
_LOOKS = 4  # an epoch
_SHRINK = 0.75  # of the step size with each rollback
_ABOVE_CHANCE = 1.5  # least accuracy under PGD, in chances, that can be lost


class CollapseError(Exception):
    """Says what collapsed; the training may roll back."""


@dataclass(frozen=True)
class Look:
    """Accuracies in percent on some validation images, under PGD-10 and the one-step attack."""

    pgd: float
    one_step: float


class CollapseGuard:
    """Compares PGD-10 with the attack in training four times an epoch.

    Attributes:
        attack: the one-step attack as it is now, shorter after each rollback.
        last: the newest look.
    """

    def __init__(self, attack: PGD, data: Data, seed: int) -> None:
        self._first, self._seed = attack, seed
        self._images = data.val.subset(data.val.spread(_IMAGES))
        self._chance = 100 / len(data.classes)
        self._pgd = PGD(attack.eps, attack.eps / 4, 10, attack.norm)
        self._best = Look(0.0, 0.0)
        self.last: Look | None = None
        self.rollbacks = 0
        self.is_told = False  # where it only warns, once

    @property
    def attack(self) -> PGD:
        return replace(self._first, step_size=self._first.step_size * _SHRINK**self.rollbacks)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to look after ``step`` (from 1) of an epoch of ``steps``."""
        return step == steps or step % max(1, steps // _LOOKS) == 0

    def look(self, forward: Forward, where: str) -> None:
        """Measure, and raise ``CollapseError`` where PGD's accuracy has fallen below half of its
        best while the one-step attack's has not."""
        pgd, one_step = (
            score(forward, self._images, attack, seed=self._seed).accuracy
            for attack in (self._pgd, self.attack)
        )
        self.last, best = Look(pgd, one_step), self._best
        self._best = Look(max(best.pgd, pgd), max(best.one_step, one_step))
        if (
            best.pgd >= _ABOVE_CHANCE * self._chance
            and pgd < best.pgd / 2
            and one_step > max(best.one_step / 2, 2 * pgd)
        ):
            raise CollapseError(
                f"catastrophic overfitting in {where}: accuracy under PGD-10 fell from"
                f" {best.pgd:.1f} to {pgd:.1f} % of {len(self._images)} validation images, and is"
                f" {one_step:.1f} % under the one-step attack in training"
            )

    def figures(self) -> dict[str, float]:
        """Of the last look, for ``metrics.jsonl``."""
        if self.last is None:
            return {}
        size = {"step_size": 255 * self.attack.step_size} if self.rollbacks else {}
        return {"guard_ra": self.last.pgd, "guard_one_step_ra": self.last.one_step, **size}

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": [self._best.pgd, self._best.one_step],
            "last": [self.last.pgd, self.last.one_step] if self.last else None,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = Look(*map(float, state["best"]))
        self.last = Look(*map(float, state["last"])) if state["last"] else None
        self.rollbacks = int(state["rollbacks"])

"""Learning rates, and the plan of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.attacks import PGD


@dataclass(frozen=True)
class Plan:
    """One training from its first step to its last: what it sees and at which rate.

    Attributes:
        epochs: how many.
        attack: None trains on the images as they are.
        attack_training: craft in train mode (the paper's way) or eval mode.
        seed: of the order, the augmentation and the attack's starts.
        lr: rate at the start, or the peak of a cycle.
        milestones: epochs at which the rate is divided by ten; None rises to ``lr`` and falls to 0
            over the whole training.
    """

    epochs: int
    attack: PGD | None
    attack_training: bool
    seed: int
    lr: float
    milestones: tuple[int, ...] | None

    @property
    def attack_steps(self) -> int:
        return 0 if self.attack is None else self.attack.steps

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate at ``step`` of ``steps`` in ``epoch``, all counted from 0."""
        if self.milestones is not None:
            return learning_rate(epoch, self.lr, self.milestones)
        return cyclic_rate((epoch + (step + 0.5) / steps) / self.epochs, self.lr)


def cyclic_rate(fraction: float, peak: float) -> float:
    """Up from 0 and down to 0 in straight lines over ``fraction`` 0 to 1 of a training, with the
    peak at two fifths."""
    return peak * min(fraction / 0.4, (1 - fraction) / 0.6)


def learning_rate(epoch: int, initial: float, milestones: Sequence[int]) -> float:
    """The rate during ``epoch`` (from 0): a tenth of the one before from each milestone on."""
    return initial * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

"""The plan of a training stage, and its learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from utils.attacks import PGD
from utils.training.losses import LOSSES, NO_OPTIONS, Options, TrainLoss

ON_COLLAPSE = ("stop", "warn", "rollback")
LR_SCHEDULES = ("step", "cosine", "onecycle")


@dataclass(frozen=True)
class Plan:
    """The settings of one stage of training: attack, loss, learning rate and averages.

    Attributes:
        attack: the attack in training; None trains on clean images.
        attack_training: whether to attack in train mode (as in the paper) or in eval mode.
        seed: of the order of the images, their augmentation and the random starts.
        lr: rate at the start, or the peak of a cycle.
        milestones: epochs at which the rate is divided by ten.
        schedule: ``step``, by the milestones; ``cosine``, from ``lr`` to 0; ``onecycle``, up to
            ``lr`` and down to 0.
        loss, options: the training loss and its settings.
        awp: length of the adversarial weight perturbation relative to each layer; 0 for none.
        awp_start: the first epoch (from 0) with that perturbation.
        ema: decay of an exponential average of the weights; 0 for none.
        guarded: whether one-step training is watched for catastrophic overfitting.
        swa_start: the first epoch (from 0) whose weights enter a mean over epochs; None for none.
    """

    epochs: int
    attack: PGD | None
    attack_training: bool
    seed: int
    lr: float
    milestones: tuple[int, ...]
    schedule: str = "step"
    loss: TrainLoss = LOSSES["ce"]
    options: Options = NO_OPTIONS
    awp: float = 0.0
    awp_start: int = 0
    ema: float = 0.0
    guarded: bool = False
    swa_start: int | None = None

    @property
    def attack_steps(self) -> int:
        return 0 if self.attack is None else self.attack.steps

    def further_passes(self, epoch: int) -> int:
        """Passes per image in an epoch (from 0) beyond the attack steps and one update; a forward
        pass with a backward pass to the weights counts as three."""
        update = 3 + self.loss.further_passes
        reference = int(self.attack is not None and self.attack.loss == "kl")
        return reference + update * (2 if self.perturbs(epoch) else 1) - 3

    def perturbs(self, epoch: int) -> bool:
        """Whether the weights are perturbed in an epoch (from 0)."""
        return self.awp > 0 and epoch >= self.awp_start

    def step_options(self, epoch: int) -> dict[str, Any]:
        """Arguments of ``train_step`` in an epoch (from 0)."""
        return {
            "attack": self.attack,
            "attack_training": self.attack_training,
            "key": (self.seed, "attack", epoch),
            "loss": self.loss,
            "options": self.options,
            "awp": self.awp if self.perturbs(epoch) else 0.0,
        }

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate at ``step`` of ``steps`` in ``epoch``, all counted from 0."""
        if self.schedule == "step":
            return learning_rate(epoch, self.lr, self.milestones)
        fraction = (epoch + (step + 0.5) / steps) / self.epochs
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * fraction)) / 2
        return cyclic_rate(fraction, self.lr)


def cyclic_rate(fraction: float, peak: float) -> float:
    """Linear from 0 up to ``peak`` and down to 0 over a training, with the peak at ``fraction`` 0.4
    of it."""
    return peak * min(fraction / 0.4, (1 - fraction) / 0.6)


def learning_rate(epoch: int, initial: float, milestones: Sequence[int]) -> float:
    """The rate during ``epoch`` (from 0), divided by ten at each milestone."""
    return initial * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

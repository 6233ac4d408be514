"""Losses of adversarial training.

Each entry also names the loss and the start of the attack that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks import kl_divergence

Network = Callable[[Tensor], Tensor]
LossOf = Callable[[nn.Module], Tensor]  # mean loss of one batch for any network


@dataclass(frozen=True)
class Options:
    """Settings of a loss: the weight of its robust term, and the smoothing of its labels."""

    beta: float = 0.0
    label_smoothing: float = 0.0


NO_OPTIONS = Options()
# Network, images [N, C, H, W], their adversarial images, labels [N], options -> the mean loss over
# the batch, and the logits of the adversarial images.
Compute = Callable[[Network, Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainLoss:
    """A training loss; ``LOSSES`` lists them by name, and a custom one is added there.

    Attributes:
        reference: its source.
        beta: default weight of its robust term; None if it has none.
        further_passes: per image, beyond those of the adversarial image to the weights and back.
        attack: the loss that PGD ascends in training, one of ``utils.attacks.LOSSES``.
        start: where PGD starts in training, one of ``utils.attacks.STARTS``.
        attack_mode: the network's mode while it is attacked in training.
    """

    compute: Compute
    reference: str
    beta: float | None = None
    further_passes: int = 0
    attack: str = "ce"
    start: str = "uniform"
    attack_mode: str = "train"


def cross_entropy(
    network: Network, images: Tensor, attacked: Tensor, y: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the adversarial images."""
    logits = network(attacked)
    return F.cross_entropy(logits, y, label_smoothing=options.label_smoothing), logits


def trades(
    network: Network, images: Tensor, attacked: Tensor, y: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """CE(p(x), y) + beta KL(p(x) || p(x')): accuracy on clean images against stability around them.

    Clean and adversarial images pass through the network in separate batches, as in the authors'
    code, so batch norm sees each on its own.
    """
    clean, logits = network(images), network(attacked)
    loss = F.cross_entropy(clean, y, label_smoothing=options.label_smoothing)
    return loss + options.beta * kl_divergence(logits, clean).mean(), logits


LOSSES = {
    "ce": TrainLoss(cross_entropy, "Madry et al., 2018"),
    "trades": TrainLoss(
        trades,
        "Zhang et al., 2019",
        beta=6.0,
        further_passes=3,
        attack="kl",
        start="gaussian",
        attack_mode="eval",
    ),
}

"""Losses of adversarial training, which an update descends.

Each names the loss and the start of the attack that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks import kl_divergence

Network = Callable[[Tensor], Tensor]
LossOf = Callable[[nn.Module], Tensor]  # the mean loss of one batch, of any network


@dataclass(frozen=True)
class Options:
    """Settings of a loss: the weight of its robust term, and the smoothing of its labels."""

    beta: float = 0.0
    label_smoothing: float = 0.0


NO_OPTIONS = Options()
# Network, images [N, C, H, W], the same attacked, labels [N], options -> the mean loss over the
# batch, and the logits of the attacked images.
Compute = Callable[[Network, Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainLoss:
    """A loss to train by; ``LOSSES`` names them, and a custom one is added there.

    Attributes:
        compute: the loss.
        reference: where it comes from.
        beta: the default weight of its robust term; None without one.
        further_passes: an image, beyond the attacked image's to the weights and back.
        attack: loss that PGD ascends in training, one of ``utils.attacks.LOSSES``.
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
    """Cross-entropy of the attacked images."""
    logits = network(attacked)
    return F.cross_entropy(logits, y, label_smoothing=options.label_smoothing), logits


def trades(
    network: Network, images: Tensor, attacked: Tensor, y: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """CE(p(x), y) + beta KL(p(x) || p(x')): accuracy on clean images against stability around them.

    Clean and attacked images pass the network one batch after the other, as in the authors' code,
    so that batch norm sees each by itself.
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

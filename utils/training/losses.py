"""Losses of adversarial training: what an update descends, and what its attack ascends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]


class Compute(Protocol):
    """Mean loss over a batch, and the logits of the attacked images."""

    def __call__(
        self,
        network: Network,
        images: Tensor,
        attacked: Tensor,
        y: Tensor,
        *,
        beta: float,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainLoss:
    """A loss to train by; ``LOSSES`` names them, and a custom one is added there.

    Attributes:
        compute: the loss (``Compute``); ``network`` maps images ``[N, C, H, W]`` to logits.
        reference: where it comes from.
        attack_loss: what the attack ascends, one of ``utils.attacks.LOSSES``.
        attack_start: the attack's random start, one of ``utils.attacks.STARTS``.
        attack_training: whether the attack runs in train mode.
        clean_passes: forward and backward passes on clean images that an update adds.
        beta: the default weight of its robust term; None without one.
    """

    compute: Compute
    reference: str
    attack_loss: str = "ce"
    attack_start: str = "uniform"
    attack_training: bool = True
    clean_passes: int = 0
    beta: float | None = None


def cross_entropy(
    network: Network,
    images: Tensor,
    attacked: Tensor,
    y: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the attacked images."""
    logits = network(attacked)
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing), logits


def trades(
    network: Network,
    images: Tensor,
    attacked: Tensor,
    y: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """CE(p(x), y) + beta KL(p(x) || p(x')): accuracy on clean images against stability around them.

    Clean and attacked images pass the network one batch after the other, as in the authors' code,
    so that batch norm sees each by itself.
    """
    clean, logits = network(images), network(attacked)
    loss = F.cross_entropy(clean, y, label_smoothing=label_smoothing)
    return loss + beta * kl_divergence(logits, clean).mean(), logits


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p || q) of each image ``[N]``, p by the logits ``reference`` and q by ``logits``."""
    p, q = reference.log_softmax(dim=1), logits.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


LOSSES = {
    "ce": TrainLoss(cross_entropy, "Madry et al., 2018"),
    "trades": TrainLoss(
        trades,
        "Zhang et al., 2019",
        attack_loss="kl",
        attack_start="gaussian",
        attack_training=False,
        clean_passes=1,
        beta=6.0,
    ),
}

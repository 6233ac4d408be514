"""Uses the library in a custom training loop: a small network learns to tell patches of two
photographs apart.

    python examples/library.py

Network, data and loop are the example's own. From this repository it takes ``Masking`` (sparse from
the first step), ``pgd_attack`` (adversarial images), ``EarlyBird`` (whether a dense network's
ticket has emerged) and ``evaluate``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from data import Split
from sparse_core import Masking, MaskingConfig, initial_masks
from utils.attacks import PGD, pgd_attack
from utils.early_bird import EarlyBird
from utils.evaluation.scores import evaluate

Loader = DataLoader[tuple[Tensor, ...]]

SIDE = 16  # pixels of a patch
ATTACK = PGD(eps=4 / 255, step_size=2 / 255, steps=3, random_start=False)


def photograph_patches() -> tuple[Split, Split]:
    """Patches of scikit-learn's two photographs (a temple, a flower), which need no download: three
    quarters for training, the rest for the test."""
    found, labels = [], []
    for label, image in enumerate(load_sample_images().images):
        height, width = (SIDE * (side // SIDE) for side in image.shape[:2])
        tiles = (
            image[:height, :width]
            .reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3)
            .swapaxes(1, 2)
        )
        found.append(tiles.reshape(-1, SIDE, SIDE, 3))
        labels += [label] * len(found[-1])
    images = torch.from_numpy(np.concatenate(found).astype(np.uint8))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    cut = len(order) * 3 // 4
    train, test = (
        Split(images, torch.tensor(labels), rows, torch.device("cpu"))
        for rows in (order[:cut], order[cut:])
    )
    return train, test


def shuffled(split: Split) -> Loader:
    """An ordinary torch loader of images ``[N, 3, 16, 16]`` in [0, 1] and labels."""
    images = split.images[split.indices].permute(0, 3, 1, 2).float() / 255
    return DataLoader(
        TensorDataset(images, split.labels[split.indices]), batch_size=64, shuffle=True
    )


def small_network() -> nn.Module:
    """Two convolutions and a linear layer, logits of two classes."""
    torch.manual_seed(0)
    one, two = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
    return nn.Sequential(
        one,
        nn.BatchNorm2d(32),
        nn.ReLU(),
        two,
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 2),
    )


def train_sparse(
    model: nn.Module, loader: Loader, epochs: int, masks: dict[str, Tensor] | None = None
) -> Masking:
    """Adversarial training at density 0.1: Flying Bird, or static training with ``masks``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    config = MaskingConfig(
        0.1,
        total_steps=epochs * len(loader),
        growth="gradient",
        update_frequency=10,
        fixed=masks is not None,
    )
    masking = Masking(model, optimizer, config, masks=masks)
    for _ in range(epochs):
        for x, y in loader:
            attacked = pgd_attack(model, x, y, ATTACK, training=True)
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), y).backward()
            optimizer.step()
            masking.step()
    return masking


def train_until_ticket(model: nn.Module, loader: Loader, most: int) -> int:
    """Train a dense network on clean images until the masks of three epochs agree; returns the
    number of epochs, at most ``most``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    bird = EarlyBird(density=0.1, window=3)
    for epoch in range(most):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if bird.observe(model):
            return epoch + 1
    return most


def main() -> None:
    train, test = photograph_patches()
    loader, model = shuffled(train), small_network()
    masking = train_sparse(model, loader, epochs=6)
    sa, ra = evaluate(model, test).accuracy, evaluate(model, test, ATTACK).accuracy
    print(
        f"Flying Bird: density {masking.density():.4f}, explored {masking.explored_fraction():.4f},"
        f" SA {sa:.1f}, RA {ra:.1f}"
    )

    model = small_network()
    epochs = train_until_ticket(model, loader, most=10)
    train_sparse(model, loader, epochs=6, masks=initial_masks(model, 0.1, "magnitude"))
    sa, ra = evaluate(model, test).accuracy, evaluate(model, test, ATTACK).accuracy
    print(f"Robust Bird: ticket after {epochs} epochs, SA {sa:.1f}, RA {ra:.1f}")


if __name__ == "__main__":
    main()

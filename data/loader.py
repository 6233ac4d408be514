"""Splits that live on the training device as uint8, and the batches made of them.

A data set that does not fit stays memory-mapped on disk; only the rows of a batch travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.augment import Augmentation, augment, to_float
from utils.seeding import permutation, stream


@dataclass(frozen=True)
class Split:
    """Some rows of a stored image set.

    Attributes:
        images: uint8 ``[rows, H, W, C]``, shared between splits; on ``device`` or memory-mapped on the CPU.
        labels: int64 ``[rows]`` on ``device``.
        indices: int64, the rows of this split, on ``device``; an image's index is its row.
        device: where batches are handed out.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    device: torch.device

    def __len__(self) -> int:
        return self.indices.numel()

    def rows(self, indices: Tensor) -> Tensor:
        """The uint8 images at ``indices``, on ``device``."""
        return self.images[indices.to(self.images.device)].to(self.device, non_blocking=True)

    def subset(self, indices: Tensor) -> Split:
        """The same storage with other rows."""
        return replace(self, indices=indices.to(self.device))


@dataclass(frozen=True)
class Batch:
    """Images ``x`` float32 ``[N, C, H, W]`` in [0, 1], labels ``y`` and data set ``indices``, both int64 ``[N]``."""

    x: Tensor
    y: Tensor
    indices: Tensor


class TrainLoader:
    """Shuffled, augmented batches; everything in an epoch is a pure function of ``(seed, epoch)``.

    The last batch may be smaller. A single image left over joins the batch before it, since batch norm
    cannot train on one value a channel.
    """

    def __init__(self, split: Split, batch_size: int, augmentation: Augmentation, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        self.split = split
        self.augmentation = augmentation
        self.seed = seed
        starts = list(range(0, len(split), batch_size))
        if len(starts) > 1 and len(split) - starts[-1] == 1:
            starts.pop()
        self._bounds = list(zip(starts, [*starts[1:], len(split)], strict=True))

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._bounds)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` (from 0), from step ``first_step`` on."""
        order = self.split.indices[permutation(len(self.split), stream(self.seed, "order", epoch), self.split.device)]
        for start, end in self._bounds[first_step:]:
            indices = order[start:end]
            x = augment(self.split.rows(indices), indices, self.augmentation, self.seed, epoch)
            yield Batch(x, self.split.labels[indices], indices)


def plain_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The images of a split in order, un-augmented."""
    for indices in split.indices.split(batch_size):
        yield Batch(to_float(split.rows(indices)), split.labels[indices], indices)

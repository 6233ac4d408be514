"""Splits, stored as uint8 on the training device, and the batches made from them.

A data set that does not fit stays memory-mapped on disk; only the rows of a batch are transferred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.augment import Augmentation, augment, to_float
from data.streaming import streamed
from utils.execution.distributed import ALONE, World
from utils.seeding import permutation, stream


@dataclass(frozen=True)
class Split:
    """Some rows of a stored image set.

    Attributes:
        images: uint8 ``[rows, H, W, C]``, shared between splits; on ``device`` or memory-mapped on
            the CPU.
        labels: int64 ``[rows]`` on ``device``.
        indices: int64, the rows of this split, on ``device``; an image's index is its row.
        device: device of the batches.
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

    def batches(self, wanted: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each index tensor of ``wanted`` (on the images' device), the images and the indices,
        both on ``device``."""
        # not ``device``, which may lack the index
        if self.images.device == self.indices.device:
            return ((self.images[indices], indices) for indices in wanted)
        return streamed(self.images, wanted, self.device)

    def spread(self, n: int) -> Tensor:
        """The indices of ``n`` images (at most all) spread evenly over the split, since image
        folders are sorted by class."""
        n = min(n, len(self))
        return self.indices[torch.arange(n, device=self.indices.device) * len(self) // n]

    def subset(self, indices: Tensor) -> Split:
        """A split of other rows of the same storage."""
        return replace(self, indices=indices.to(self.device))


@dataclass(frozen=True)
class Batch:
    """This process's images of a training step, or of a test.

    Attributes:
        x: float32 ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``.
        indices: rows of the images in their data set, int64 ``[N]``.
        weight: share of these images in the step's mean loss; 0 if the process has none of its own
            and repeats others.
        step_images: images in the whole step, over all processes; N by default.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    weight: float = 1.0
    step_images: int | None = None

    @property
    def total(self) -> int:
        """Images in the whole step."""
        return len(self.y) if self.step_images is None else self.step_images


class TrainLoader:
    """Shuffled, augmented batches; everything in an epoch is a pure function of ``(seed, epoch)``.

    The last batch may be smaller. A single image left over joins the batch before it, since batch
    norm cannot train on one value per channel. For the same reason, each process gets at least
    ``least`` images of a batch. Processes for which none are left repeat the batch's first images,
    which then do not count.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        *,
        world: World = ALONE,
        least: int = 2,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        self.split = split
        self.augmentation = augmentation
        self.seed = seed
        self._world, self._least = world, least
        starts = list(range(0, len(split), batch_size))
        if len(starts) > 1 and len(split) - starts[-1] == 1:
            starts.pop()
        self._bounds = list(zip(starts, [*starts[1:], len(split)], strict=True))

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._bounds)

    @property
    def most(self) -> int:
        """This process's images in the first batch, and in nearly all others."""
        first, last, _ = self._part(self._bounds[0][1])
        return last - first

    @property
    def smallest(self) -> int:
        """Images in the smallest batch, over all processes."""
        return min(end - start for start, end in self._bounds)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of ``epoch`` (from 0), from step ``first_step`` on."""
        split, key = self.split, stream(self.seed, "order", epoch)
        place = split.images.device  # rows are chosen where the images are stored
        order = split.indices.to(place)[permutation(len(split), key, place)]
        bounds = self._bounds[first_step:]
        parts = [self._part(end - start) for start, end in bounds]
        wanted = [
            order[start + first : start + last]
            for (start, _), (first, last, _) in zip(bounds, parts, strict=True)
        ]
        for (start, end), (first, last, counts), (stored, indices) in zip(
            bounds, parts, split.batches(wanted), strict=True
        ):
            x = augment(stored, indices, self.augmentation, self.seed, epoch)
            weight = (last - first) / (end - start) if counts else 0.0
            yield Batch(x, split.labels[indices], indices, weight, end - start)

    def _part(self, images: int) -> tuple[int, int, bool]:
        """Start and end of this process's images in a batch of ``images``, and whether they
        count."""
        rank, holders = self._world.rank, max(1, min(self._world.size, images // self._least))
        if rank >= holders:
            return 0, min(self._least, images), False
        return images * rank // holders, images * (rank + 1) // holders, True


def plain_batches(split: Split, batch_size: int, world: World = ALONE) -> Iterator[Batch]:
    """Unaugmented batches of a split, in order, dealt out to the processes in turn."""
    for indices in split.indices.split(batch_size)[world.rank :: world.size]:
        yield Batch(to_float(split.rows(indices)), split.labels[indices], indices)

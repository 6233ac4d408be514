"""Augmentation of whole batches on the training device: crop, flip and rotation in one gather."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.seeding import random_bits, stream, uniform


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image, applied in this order.

    Attributes:
        padding: zero pixels on each side before a random crop of the original size.
        flip: mirror left to right with probability one half.
        rotation: rotate by a uniform angle of up to this many degrees either way; nearest
            neighbour, zeros outside.
    """

    padding: int = 0
    flip: bool = False
    rotation: float = 0.0


def augment(
    images: Tensor, indices: Tensor, augmentation: Augmentation, seed: int, epoch: int
) -> Tensor:
    """Augment a batch.

    Args:
        images: uint8 ``[N, H, W, C]``.
        indices: int64 ``[N]``, each image's row in its data set; its draws depend only on this row,
            ``seed`` and ``epoch``.

    Returns:
        Float32 images ``[N, C, H, W]`` in [0, 1], channels-last in memory.
    """
    top, left, flipped, angle = _draw(indices, augmentation, seed, epoch)
    n, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device).view(1, height, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, width)
    # From each output pixel back to its source: undo the rotation, then the flip, then the crop.
    inside = None
    if augmentation.rotation:
        rows, columns, inside = _rotate_back(rows, columns, angle, height, width)
    if augmentation.flip:
        columns = torch.where(flipped.view(n, 1, 1), width - 1 - columns, columns)
    rows = rows + top.view(n, 1, 1)
    columns = columns + left.view(n, 1, 1)
    valid = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    if inside is not None:
        valid = valid & inside
    batch = torch.arange(n, device=images.device).view(n, 1, 1)
    gathered = images[batch, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return to_float(gathered * valid.unsqueeze(-1))


def to_float(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, C]`` to float32 ``[N, C, H, W]`` in [0, 1], channels-last in memory."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def _draw(
    indices: Tensor, augmentation: Augmentation, seed: int, epoch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw for each image the crop offsets (rows down, columns right), whether to flip, and the
    angle in radians."""
    keys = random_bits(stream(seed, "augment", epoch), indices)[:, None]
    draws = uniform(keys, torch.arange(4, device=indices.device))
    shifts = (draws[:, :2] * (2 * augmentation.padding + 1)).long() - augmentation.padding
    angles = (2 * draws[:, 3] - 1) * math.radians(augmentation.rotation)
    return shifts[:, 0], shifts[:, 1], draws[:, 2] < 0.5, angles


def _rotate_back(
    rows: Tensor, columns: Tensor, angle: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Source row and column of each output pixel under a counter-clockwise rotation about the
    centre, and whether they lie within the image."""
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    source_x = torch.round(cos * x - sin * y + (width - 1) / 2).long()
    source_y = torch.round(sin * x + cos * y + (height - 1) / 2).long()
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    return source_y, source_x, inside

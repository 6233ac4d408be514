"""Loading data sets: ``load_data`` returns splits, classes, normalization and augmentation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from data.arrays import in_form
from data.augment import Augmentation
from data.folders import DIGEST_BYTES, pixels_digest
from data.loader import Split, plain_batches
from data.sources import SOURCES, DataLocation, ImageSet, Source, default_cache, stratified
from utils.errors import InputError, one_line
from utils.seeding import permutation, stream


@dataclass(frozen=True)
class Data:
    """A data set ready for training: splits on one device, classes, normalization, augmentation.

    ``digests`` identify the whole data set, before any subset and wherever it is stored: hex
    digests of its "classes", "training labels", "training pixels", "test labels" and "test pixels".
    ``notes`` tell a user how it was read, where that matters.
    """

    train: Split
    val: Split
    test: Split
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """One hex digest of ``digests``; empty where there are none."""
        return _digest(json.dumps(self.digests, sort_keys=True).encode()) if self.digests else ""

    def numbered(self, classes: Sequence[str]) -> Data:
        """The same data with its classes renumbered in the order of ``classes``."""
        place = torch.tensor(
            [classes.index(name) for name in self.classes], device=self.train.device
        )
        train, val, test = (
            replace(split, labels=place[split.labels])
            for split in (self.train, self.val, self.test)
        )
        return replace(self, classes=list(classes), train=train, val=val, test=test)

    @property
    def images(self) -> dict[str, int]:
        """Number of images by split."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}

    @property
    def image_shape(self) -> torch.Size:
        """``[C, H, W]`` of one image."""
        height, width, channels = self.train.images.shape[1:]
        return torch.Size((channels, height, width))


def load_data(
    name: str,
    root: str | Path = "data",
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    train_subset: int | None = None,
    test_subset: int | None = None,
    cache_dir: str | Path | None = None,
    memory_budget: int | None = None,
) -> Data:
    """Load one of the six data sets.

    Args:
        name: one of ``SOURCES``.
        root: folder of the data (or where torchvision downloads it).
        device: device of the uint8 images and of the batches.
        image_size: side in pixels to which image folders are resized, by area, when decoded.
        train_subset, test_subset: number of images to use, stratified; validation stays whole.
        cache_dir: where decoded image folders are kept.
        memory_budget: bytes of images that may live on ``device``; beyond it they are memory-mapped
            and streamed. Default: half of the memory now free there.

    Raises:
        InputError: unknown name, missing or corrupt files, ambiguous arrays (``data.arrays``),
            a single class, impossible subset.
    """
    device = torch.device(device)
    place = DataLocation(Path(root), Path(cache_dir or default_cache()), image_size)
    source, changes = _read(name, place)
    budget = memory_budget if memory_budget is not None else _free_memory(device) // 2
    fits = sum(part.opened().nbytes for part in (source.training, source.test)) <= budget
    training = _stored(source.training, device, fits)
    held_out = _stored(source.test, device, fits)
    train = training.subset(torch.from_numpy(source.train))
    mean, std = source.mean, source.std
    if mean is None or std is None:
        mean, std = channel_statistics(train)
    return Data(
        train=_thinned(train, train_subset, "--train_subset"),
        val=training.subset(torch.from_numpy(source.val)),
        test=_thinned(held_out, test_subset, "--test_subset"),
        classes=source.classes,
        mean=mean,
        std=std,
        augmentation=source.augmentation,
        digests=_digests(source),
        notes=(*source.training.notes, *source.test.notes, *changes),
    )


def _read(name: str, place: DataLocation) -> tuple[Source, list[str]]:
    """The images of a data set in the form used here, and what that changed."""
    if name not in SOURCES:
        raise InputError(f"unknown data set {name!r}; known: {', '.join(SOURCES)}")
    try:
        found = SOURCES[name](place)
    except OSError as error:
        raise InputError(f"cannot read {name} in {place.root} ({one_line(error)})") from error
    try:
        source, changes = in_form(found)
    except InputError as error:
        raise InputError(f"{name} in {place.root}: {error}") from error
    if min(len(source.train), len(source.val), len(source.test.labels)) < 2:
        raise InputError(f"{place.root}: too few images to train, validate and test on")
    if len(source.classes) < 2:
        raise InputError(f"{place.root} has only the class {source.classes[0]}: nothing to learn")
    return source, changes


def calibration_batches(
    data: Data, per_class: int = 10, *, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images and labels for SNIP and GraSP, not augmented: about ``per_class``
    images of each class, shuffled by ``seed``."""
    train = data.train
    # Image folders are sorted by class, and a batch of few classes would score only their weights.
    mixed = train.subset(
        train.indices[permutation(len(train), stream(seed, "calibration"), train.device)]
    )
    n = min(len(mixed), per_class * len(data.classes))
    return [
        (batch.x, batch.y) for batch in plain_batches(_thinned(mixed, n, "calibration images"), 128)
    ]


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over a split, pixels in [0, 1]; exact, from
    integer histograms."""
    channels = split.images.shape[-1]
    histogram = torch.zeros(channels, 256, dtype=torch.int64)
    for indices in split.indices.split(4096):
        flat = split.rows(indices).reshape(-1, channels)
        histogram += torch.stack(
            [torch.bincount(flat[:, c].long(), minlength=256) for c in range(channels)]
        ).cpu()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = histogram.double() / histogram.sum(dim=1, keepdim=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(dim=1)
    # A constant channel is shifted but not scaled.
    std = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
    return tuple(mean.tolist()), tuple(std.tolist())


def _digests(source: Source) -> dict[str, str]:
    digests = {"classes": _digest(json.dumps(source.classes).encode())}
    for part, found in (("training", source.training), ("test", source.test)):
        digests[f"{part} labels"] = _digest(found.labels.astype("<i8").tobytes())
        digests[f"{part} pixels"] = found.digest or pixels_digest(found.opened())
    return digests


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


def _thinned(split: Split, n: int | None, flag: str) -> Split:
    if n is None:
        return split
    try:
        rows = stratified(split.labels[split.indices].cpu().numpy(), n)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    return split.subset(split.indices[torch.from_numpy(rows).to(split.device)])


def _stored(image_set: ImageSet, device: torch.device, fits: bool) -> Split:
    """A split of all rows; a file is read if it fits into memory, else memory-mapped."""
    stored: Tensor = torch.from_numpy(image_set.opened(mapped=not fits))
    labels = torch.from_numpy(image_set.labels).to(device)
    return Split(
        stored.to(device) if fits else stored,
        labels,
        torch.arange(len(labels), device=device),
        device,
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # MemAvailable includes pages that only cache files and can be reclaimed
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

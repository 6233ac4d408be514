"""The six data sets: where their images come from and how they are split."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.augment import Augmentation
from data.folders import Files, cached_images, class_folders, scan_classes
from utils.compat import import_torchvision
from utils.errors import InputError

_DIM = 63  # if no pixel is brighter, the scale is probably not 0 to 255
_SPLIT_SEED = 10  # the seed of the paper's Tiny-ImageNet split, used for every fixed permutation


@dataclass(frozen=True)
class ImageSet:
    """Images as found, uint8 ``[N, H, W, C]`` or the path of an ``.npy`` with them, and labels,
    int64 ``[N]``.

    ``data.arrays.in_form`` converts other types where that is unambiguous. ``digest`` is the
    ``pixels_digest`` of the images if known without reading them; ``notes`` tell a user how they
    were read.
    """

    images: np.ndarray | Path
    labels: np.ndarray
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def opened(self, *, mapped: bool = True) -> np.ndarray:
        """The images; those of a file as a memory map, or read if not ``mapped``."""
        if not isinstance(self.images, Path):
            return self.images
        # Copy-on-write: torch wants a writable map, and nothing ever writes to it.
        return np.load(self.images, mmap_mode="c" if mapped else None)


@dataclass(frozen=True)
class Source:
    """A data set before it is placed on a device. ``train`` and ``val`` are rows of ``training``;
    ``mean`` and ``std`` are measured if None."""

    training: ImageSet
    test: ImageSet
    train: np.ndarray
    val: np.ndarray
    classes: list[str]
    augmentation: Augmentation
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def default_cache() -> Path:
    """The default folder of decoded images: in the user's cache, or among the temporary files if
    the user has no home."""
    with contextlib.suppress(RuntimeError):
        if os.environ.get("HOME") != "":  # else the cache would be in the root folder
            return Path.home() / ".cache" / "sparse-adversarial"
    return Path(tempfile.gettempdir()) / f"sparse-adversarial-{os.getuid()}"


@dataclass(frozen=True)
class DataLocation:
    """Where to look and how to decode: ``root`` of the data, ``cache_dir`` and ``image_size`` for
    image folders."""

    root: Path
    cache_dir: Path = field(default_factory=lambda: default_cache())
    image_size: int | None = None


# ---------------------------------------------------------------- splits


def stratified(labels: np.ndarray, n: int) -> np.ndarray:
    """Sorted rows of ``n`` images, stratified by class (largest remainders, at least one of each),
    by a fixed permutation."""
    classes, counts = np.unique(labels, return_counts=True)
    if n > len(labels):
        raise InputError(f"cannot take {n} of {len(labels)} images")
    if n < len(classes):
        raise InputError(f"{n} images cannot hold at least one of each of {len(classes)} classes")
    exact = counts * (n / len(labels))
    quota = np.maximum(np.floor(exact).astype(int), 1)
    for position in np.argsort(quota - exact, kind="stable"):
        if quota.sum() < n and quota[position] < counts[position]:
            quota[position] += 1
    while quota.sum() > n:  # classes too small for a share of their own got one image
        quota[np.argmax(quota)] -= 1
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    chosen = [order[labels[order] == c][:q] for c, q in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def _rest(total: int, taken: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(total), taken)


# ---------------------------------------------------------------- data sets


def digits(place: DataLocation) -> Source:
    """scikit-learn's handwritten digits, 8x8 and grey: 1,000 train, 300 val, 497 test."""
    # scikit-learn is found but not imported, which would take seconds
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",")  # 64 values from 0 to 16, and the digit
    images = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = rows[:, -1].astype(np.int64)
    test = stratified(labels, 497)
    remaining = _rest(len(labels), test)
    training = ImageSet(images[remaining], labels[remaining])
    val = stratified(training.labels, 300)
    return Source(
        training=training,
        test=ImageSet(images[test], labels[test]),
        train=_rest(len(training.labels), val),
        val=val,
        classes=[str(digit) for digit in range(10)],
        augmentation=Augmentation(padding=1),
    )


def cifar10(place: DataLocation) -> Source:
    """CIFAR-10; the last tenth of the training images is for validation."""
    return _cifar(
        "CIFAR10",
        place,
        Augmentation(4, flip=True),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    )


def cifar100(place: DataLocation) -> Source:
    """CIFAR-100; the last tenth of the training images is for validation."""
    augmentation = Augmentation(4, flip=True, rotation=15.0)
    return _cifar(
        "CIFAR100", place, augmentation, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    )


def _cifar(
    name: str,
    place: DataLocation,
    augmentation: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Source:
    training, test = (_torchvision(name, place, train=train) for train in (True, False))
    count = len(training.targets)
    val = count // 10  # the last 5,000 of 50,000
    return Source(
        training=ImageSet(training.data, np.asarray(training.targets, dtype=np.int64)),
        test=ImageSet(test.data, np.asarray(test.targets, dtype=np.int64)),
        train=np.arange(count - val),
        val=np.arange(count - val, count),
        classes=list(training.classes),
        augmentation=augmentation,
        mean=mean,
        std=std,
    )


def svhn(place: DataLocation) -> Source:
    """Street View House Numbers: 90 / 10 split by a fixed permutation, no flip."""
    training, test = (_torchvision("SVHN", place, split=split) for split in ("train", "test"))
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(training.labels))
    cut = len(order) - len(order) // 10
    return Source(
        training=ImageSet(
            np.ascontiguousarray(training.data.transpose(0, 2, 3, 1)),
            training.labels.astype(np.int64),
        ),
        test=ImageSet(
            np.ascontiguousarray(test.data.transpose(0, 2, 3, 1)), test.labels.astype(np.int64)
        ),
        train=np.sort(order[:cut]),
        val=np.sort(order[cut:]),
        classes=[str(c) for c in range(10)],
        augmentation=Augmentation(4),
    )


def _torchvision(name: str, place: DataLocation, **options):
    """A torchvision data set, downloaded into ``place.root`` if it is not there."""
    data_set = getattr(import_torchvision("datasets"), name)
    if place.root.name == getattr(data_set, "base_folder", None):
        place = replace(place, root=place.root.parent)
    try:
        return data_set(str(place.root), download=False, **options)
    except RuntimeError:
        pass  # missing or incomplete: torchvision checks and downloads
    was_there = place.root.exists()
    try:
        return data_set(str(place.root), download=True, **options)
    except Exception as error:  # its downloader raises what urllib, tarfile and hashlib raise
        if not was_there:
            with contextlib.suppress(OSError):
                place.root.rmdir()  # only if empty: a partial download may help
        raise InputError(
            f"{name} is not in {place.root} and could not be downloaded into it ({error})"
        ) from error


def tinyimagenet(place: DataLocation) -> Source:
    """Tiny-ImageNet, official archive or one folder per class: the paper's 90 / 10 split, the
    official val set as test."""
    classes = class_folders(place.root / "train")
    training = scan_classes(place.root / "train", classes, subfolder="images")
    annotations = place.root / "val" / "val_annotations.txt"
    if annotations.is_file():
        test = _annotated(annotations, classes)
    else:
        test = scan_classes(place.root / "val", classes, subfolder="images")
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(training.paths))
    cut = len(order) - len(order) // 10
    return Source(
        training=_decoded(training, place, "tinyimagenet-train"),
        test=_decoded(test, place, "tinyimagenet-val"),
        train=order[:cut],
        val=order[cut:],
        classes=classes,
        augmentation=Augmentation(4, flip=True),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
    )


def dim_note(brightest: int, what: str) -> list[str]:
    """A note if the brightest of ``what`` suggests that its scale is not 0 to 255."""
    if brightest > _DIM:
        return []
    scale = "where white is 255: attacks are measured on that scale"
    return [f"the brightest of all {what} is {brightest}, {scale}"]


def _decoded(files: Files, place: DataLocation, name: str) -> ImageSet:
    cached = cached_images(files, place.image_size, place.cache_dir, name)
    notes = []
    if files.left_out:
        others = f" and {len(files.left_out) - 1} more" if len(files.left_out) > 1 else ""
        notes.append(f"ignored, as they are not images of a class: {files.left_out[0]}{others}")
    if cached.transparent:
        notes.append(
            f"{cached.transparent} of the {len(files.paths)} images of {name} have transparent"
            " parts, which are black here"
        )
    if cached.paged:
        notes.append(
            f"{cached.paged} of the {len(files.paths)} images of {name} have further pages or"
            " frames, which are left out"
        )
    notes += dim_note(cached.brightest, f"pixels of {name}")
    return ImageSet(cached.images, files.labels, cached.digest, tuple(notes))


def _annotated(annotations: Path, classes: list[str]) -> Files:
    """The official val set: ``images/`` beside a table of file name and class."""
    number = {name: i for i, name in enumerate(classes)}
    rows = []
    for line_number, line in enumerate(annotations.read_text().splitlines(), start=1):
        fields = line.split("\t")
        # A file name with a path could lead out of the folder.
        if len(fields) < 2 or Path(fields[0]).name != fields[0] or fields[1] not in number:
            raise InputError(
                f"{annotations}, line {line_number}: not a file name and one of the training"
                " classes"
            )
        rows.append((annotations.parent / "images" / fields[0], number[fields[1]]))
    if not rows:
        raise InputError(f"{annotations}: no images named")
    rows.sort(key=lambda row: row[0].name)
    return Files(
        [path for path, _ in rows], np.asarray([label for _, label in rows], dtype=np.int64)
    )


def imagefolder(place: DataLocation) -> Source:
    """``train/<class>/*`` and ``test/<class>/*`` (or ``val``): 90 / 10 stratified split; flip, and
    crop with padding of an eighth of the side."""
    if place.root.is_dir() and not (place.root / "train").is_dir():
        raise InputError(
            f"{place.root} has no folder train; --data holds train/<class>/* and test/<class>/* (or"
            " val/<class>/*)"
        )
    classes = class_folders(place.root / "train")
    training = scan_classes(place.root / "train", classes)
    test_root = next((place.root / n for n in ("test", "val") if (place.root / n).is_dir()), None)
    if test_root is None:
        raise InputError(f"{place.root} has neither a folder test nor val beside train")
    test = scan_classes(test_root, classes)
    decoded = _decoded(training, place, "imagefolder-train")
    decoded_test = _decoded(test, place, "imagefolder-test")
    if test_root.name == "test" and (place.root / "val").is_dir():
        unused = (
            f"{place.root / 'val'} is left out: validation is on a tenth of the training images"
        )
        decoded_test = replace(decoded_test, notes=(*decoded_test.notes, unused))
    side, test_side = (part.opened().shape[1:] for part in (decoded, decoded_test))
    if side != test_side:
        raise InputError(
            f"training images have {side[1]}x{side[0]} pixels and test images"
            f" {test_side[1]}x{test_side[0]}; --image_size N brings all to one size"
        )
    scarce = [
        name for name, count in zip(classes, np.bincount(training.labels), strict=True) if count < 2
    ]
    if scarce:
        raise InputError(
            f"{place.root / 'train' / scarce[0]}: one image; each class needs one to train on and"
            " one for validation"
        )
    val = stratified(training.labels, max(len(classes), round(0.1 * len(training.labels))))
    return Source(
        training=decoded,
        test=decoded_test,
        train=_rest(len(training.labels), val),
        val=val,
        classes=classes,
        augmentation=Augmentation(min(side[0], side[1]) // 8, flip=True),
    )


SOURCES: dict[str, Callable[[DataLocation], Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tinyimagenet": tinyimagenet,
    "svhn": svhn,
    "imagefolder": imagefolder,
    "digits": digits,
}
# data sets to which image_size and cache_dir apply
DECODED_HERE = ("tinyimagenet", "imagefolder")

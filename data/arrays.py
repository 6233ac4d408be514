"""Conversion of a source's arrays to the form that training takes; ambiguous arrays are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.sources import ImageSet, Source, dim_note
from utils.errors import InputError, one_line, require

_CHUNK = 2**22  # values examined at a time
_SLACK = 1e-6  # by which floats may leave [0, 1], since interpolation overshoots


def in_form(source: Source) -> tuple[Source, list[str]]:
    """Convert a source to uint8 images ``[N, H, W, C]`` and int64 labels below the number of
    classes; returns it with notes on the changes.

    Training and test images are judged together. uint8 stays; booleans and floats in [0, 1] are
    rounded to 256 levels; anything else must hold whole numbers from 0 to 255. ``[N, H, W]`` is one
    grey channel. Labels below the number of classes stay; others are looked up among the class
    names, which default to the sorted training labels.

    Raises:
        InputError: anything else; rows, mean or std that do not fit the images.
    """
    images, notes = _images({"training": source.training, "test": source.test})
    classes, labels = _labels(source)
    made = {part: replace(found, labels=labels[part]) for part, found in images.items()}
    for part, found in made.items():
        held = len(found.opened())
        require(len(found.labels) == held, f"{held} {part} images have {len(found.labels)} labels")
    _check_statistics(source, made["training"].opened().shape[-1])
    train, val = _rows(source, len(labels["training"]))
    made_source = replace(
        source, training=made["training"], test=made["test"], train=train, val=val, classes=classes
    )
    return made_source, notes


def _array(found: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(found)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} are not an array ({one_line(error)})") from error


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class _Range:
    """Type and range of one array's pixels; ``low`` and ``high`` are NaN if any pixel is."""

    dtype: np.dtype
    low: float
    high: float
    is_whole: bool

    def __str__(self) -> str:
        odd = "" if self.is_whole else ", not all whole"
        return f"{self.dtype} from {self.low:g} to {self.high:g}{odd}"


def _images(parts: Mapping[str, ImageSet]) -> tuple[dict[str, ImageSet], list[str]]:
    arrays = {
        part: _four_dimensional(_array(found.opened(), f"{part} images"), f"{part} images")
        for part, found in parts.items()
    }
    sides = {part: "x".join(map(str, array.shape[1:])) for part, array in arrays.items()}
    require(
        sides["training"] == sides["test"],
        f"training images are {sides['training']} and test images {sides['test']} (height x width x"
        " channels)",
    )
    files = [found.opened() for found in parts.values() if isinstance(found.images, Path)]
    if len(files) == len(parts) and all(f.dtype == np.uint8 and f.ndim == 4 for f in files):
        return dict(parts), []  # decoded by us: valid without reading them
    ranges = {part: _range(array) for part, array in arrays.items()}
    scale = _scale(ranges)
    made, furthest = {}, 0.0
    for part, array in arrays.items():
        levels, moved = _levels(array, scale)
        made[part] = replace(parts[part], images=levels, digest=None)
        furthest = max(furthest, moved)
    notes = [f"pixels are rounded to 256 levels, some by {furthest:.2f} of one"] if furthest else []
    brightest = round(scale * max(found.high for found in ranges.values()))
    return made, notes + dim_note(brightest, "pixels")


def _four_dimensional(array: np.ndarray, what: str) -> np.ndarray:
    shape = list(array.shape)
    require(
        array.ndim in (3, 4) and array.size > 0,
        f"{what} have the shape {shape}; give [N, H, W, C], or [N, H, W] for grey ones",
    )
    if array.ndim == 3:
        return array[..., None]
    require(
        shape[3] <= 4 or (shape[1] not in (1, 3, 4) and not shape[1] < shape[2] == shape[3]),
        f"{what} have the shape {shape}, channels first; transpose(0, 2, 3, 1) brings them last",
    )
    return array


def _range(array: np.ndarray) -> _Range:
    require(
        array.dtype.kind in "buif",
        f"images of type {array.dtype} are not pixels; give uint8, or floats in [0, 1]",
    )
    low, high, is_whole = np.inf, -np.inf, True
    for part in _chunks(array):
        low, high = float(np.minimum(low, part.min())), float(np.maximum(high, part.max()))
        is_whole = is_whole and (part.dtype.kind != "f" or bool((part == np.rint(part)).all()))
    return _Range(array.dtype, low, high, is_whole)


def _scale(ranges: Mapping[str, _Range]) -> int:
    """The factor, 1 or 255, that scales pixels so that white is 255."""
    kinds = {found.dtype.kind for found in ranges.values()}
    if kinds <= {"b", "f"} and all(
        found.low >= -_SLACK and found.high <= 1 + _SLACK for found in ranges.values()
    ):
        return 255
    if "b" not in kinds and all(
        found.low >= 0 and found.high <= 255 and found.is_whole for found in ranges.values()
    ):
        return 1
    told = "; ".join(f"{part} images: {found}" for part, found in ranges.items())
    raise InputError(
        f"pixels of an unknown scale ({told}); give both as whole numbers from 0 to 255 or both as"
        " floats in [0, 1]"
    )


def _levels(array: np.ndarray, scale: int) -> tuple[np.ndarray, float]:
    """The array as uint8, and its largest rounding error in levels; 0 if that is within the type's
    own precision."""
    if array.dtype == np.uint8:
        return np.require(array, requirements=["C", "W"]), 0.0  # as torch wants it
    levels, furthest = np.empty(array.shape, np.uint8), 0.0
    rows = 0
    for part in _chunks(array):
        scaled = part * np.float64(scale)
        nearest = np.rint(scaled)
        levels[rows : rows + len(part)] = nearest
        furthest = max(furthest, float(np.abs(scaled - nearest).max()))
        rows += len(part)
    exact = max(0.01, 128 * float(np.finfo(array.dtype).eps)) if array.dtype.kind == "f" else 0.0
    return levels, furthest if furthest > exact else 0.0


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK // max(1, array[0].size))
    return (array[start : start + rows] for start in range(0, len(array), rows))


# ---------------------------------------------------------------- labels, rows, statistics


def _labels(source: Source) -> tuple[list[str], dict[str, np.ndarray]]:
    """The class names, and the labels of each part as class numbers."""
    parts = {"training": source.training, "test": source.test}
    given = {part: _flat(found.labels, f"{part} labels") for part, found in parts.items()}
    texts = {labels.dtype.kind == "U" for labels in given.values()}
    require(len(texts) == 1, "training and test labels must be both numbers or both names")
    trained, tested = (np.unique(labels) for labels in given.values())
    unseen = np.setdiff1d(tested, trained)
    require(
        not len(unseen),
        f"test labels {_some(unseen)} do not appear among the training labels, which are"
        f" {_some(trained)}",
    )
    classes = [str(name) for name in source.classes] or [str(label) for label in trained]
    require(len(set(classes)) == len(classes), "two classes have the same name")
    numbers = _numbers(trained, classes, numbered=isinstance(source.training.images, Path))
    return classes, {
        part: numbers[np.searchsorted(trained, labels)] for part, labels in given.items()
    }


def _flat(found: Any, what: str) -> np.ndarray:
    labels = _array(found, what)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    require(
        labels.ndim == 1 and len(labels) > 0,
        f"{what} have the shape {list(labels.shape)}; give one label per image",
    )
    require(
        labels.dtype.kind in "biufU",
        f"{what} are {labels.dtype}; give whole numbers or names of classes",
    )
    if labels.dtype.kind == "f":
        whole = np.isfinite(labels) & (labels == np.rint(labels)) & (np.abs(labels) < 2**53)
        require(bool(whole.all()), f"{what} are not whole: {_some(labels[~whole])}")
        return labels.astype(np.int64)
    return labels


def _numbers(labels: np.ndarray, classes: list[str], numbered: bool) -> np.ndarray:
    """The class number (int64) of each distinct label: the label itself, or the index of its name
    among the classes.

    If both are possible and differ, the labels are refused, unless they were ``numbered`` by our
    scan of folders, whose names may be numbers.
    """
    is_number = labels.dtype.kind in "biu" and labels.min() >= 0 and labels.max() < len(classes)
    place = {name: number for number, name in enumerate(classes)}
    for number, name in enumerate(classes):  # "3.0" also as "3"
        place.setdefault(name.removesuffix(".0"), number)
    named = [place.get(str(label)) for label in labels]
    by_name = np.asarray(named, dtype=np.int64) if None not in named else None
    if is_number:
        itself = labels.astype(np.int64)
        if by_name is not None and not numbered and not np.array_equal(itself, by_name):
            raise InputError(
                f"labels {_some(labels)} may be numbers or names of the classes {_some(classes)};"
                " number them from 0"
            )
        return itself
    if by_name is None:
        raise InputError(
            f"labels {_some(labels)} are neither numbers from 0 to {len(classes) - 1} nor names of"
            f" the classes {_some(classes)}"
        )
    return by_name


def _some(values: Any) -> str:
    """The first few values, for a message."""
    shown = ", ".join(str(value) for value in values[:5])
    return f"{shown}, ... ({len(values)})" if len(values) > 5 else shown


def _rows(source: Source, total: int) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for part, given in (("training", source.train), ("validation", source.val)):
        rows = _array(given, f"rows for {part}")
        fit = rows.ndim == 1 and rows.dtype.kind in "iu" and ((rows >= 0) & (rows < total)).all()
        text = f"rows for {part} must be whole numbers from 0 to {total - 1}, in one dimension"
        require(bool(fit), text)
        found.append(rows.astype(np.int64))
    train, val = found
    shared = len(np.intersect1d(train, val))
    require(not shared, f"{shared} images are for training and for validation")
    return train, val


def _check_statistics(source: Source, channels: int) -> None:
    for name, values in (("mean", source.mean), ("std", source.std)):
        if values is not None:
            fit = len(values) == channels and all(0 <= value <= 1 for value in values)
            text = f"one for each of {channels} channels, of pixels in [0, 1]"
            fit = fit and (name == "mean" or min(values) > 0)
            require(fit, f"{name} {tuple(values)} does not fit: {text}")

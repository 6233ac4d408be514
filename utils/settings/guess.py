"""Guess which data set a folder holds, by its content or else its name."""

from __future__ import annotations

import re
from pathlib import Path

# Files that torchvision leaves, and patterns of folder names such as "cifar-100-python" or
# "my_svhn", longer ones first.
_FILES = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100", "*_32x32.mat": "svhn"}
_NAMES = {
    r"cifar[-_ ]?100": "cifar100",
    r"cifar[-_ ]?10": "cifar10",
    r"svhn": "svhn",
    r"tiny[-_ ]?imagenet([-_ ]?200)?": "tinyimagenet",
}


def guess_data_set(path: str | Path) -> str | None:
    """A name of ``data.SOURCES``, or None. The folder's content takes precedence over its name; it
    need not exist yet."""
    folder = Path(path)
    try:
        found = _by_content(folder)
    except OSError:  # not readable
        found = None
    return found or _by_name(folder.resolve().name)


def _by_content(folder: Path) -> str | None:
    if (folder / "val" / "val_annotations.txt").is_file():
        return "tinyimagenet"
    if (folder / "train").is_dir() and any((folder / part).is_dir() for part in ("test", "val")):
        classes = [
            path
            for path in (folder / "train").iterdir()
            if path.is_dir() and not path.name.startswith(".")
        ]
        # Tiny-ImageNet with its validation images sorted into classes: folders named by WordNet
        # ids, with the images one level deeper.
        named = _by_name(folder.resolve().name) == "tinyimagenet"
        tiny = all(
            re.fullmatch(r"n\d+", path.name) and (named or (path / "images").is_dir())
            for path in classes
        )
        return "tinyimagenet" if classes and tiny else "imagefolder"
    found = {name for pattern, name in _FILES.items() if any(folder.glob(pattern))}
    return found.pop() if len(found) == 1 else None  # among several, the name decides


def _by_name(name: str) -> str | None:
    """Match whole words: "destiny" names no data set, and neither does "cifar1000"."""
    found = (
        dataset
        for pattern, dataset in _NAMES.items()
        if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", name.lower())
    )
    return next(found, None)

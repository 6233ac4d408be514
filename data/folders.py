"""Image folders: find the files, decode them once into a cache that is checked before it is trusted."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils.errors import InputError
from utils.json_files import parsed

_CACHE_FORMAT = 2
_CHUNK = 512  # images decoded between writes
DIGEST_BYTES = 16
_MOST_PIXELS = 2**26
_PATIENCE = 3.0  # seconds of decoding before a word about it
_IMAGES, _META = "images.npy", "meta.json"


@dataclass(frozen=True)
class Files:
    """Image files in a fixed order, each with its class number."""

    paths: list[Path]
    labels: np.ndarray  # int64 [files]


def class_folders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted; hidden ones do not count."""
    if not root.is_dir():
        raise InputError(f"no such folder: {root}")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"no class folders in {root}")
    return names


def image_files(folder: Path) -> list[Path]:
    """The images in ``folder`` sorted by name; files of other types and hidden files do not count."""
    extensions = Image.registered_extensions()
    # Links that lead nowhere stay, to be named when they are opened; a pipe does not: opening it would wait for ever.
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() or (entry.is_symlink() and not Path(entry).exists()))
    return [folder / n for n in names if not n.startswith(".") and os.path.splitext(n)[1].lower() in extensions]


def scan_classes(root: Path, classes: Sequence[str], *, subfolder: str = "") -> Files:
    """Files of every class folder under ``root``, by class, then name. Raises ``InputError`` for a folder that
    is not one of ``classes``, for an empty one, and for a class without one."""
    number = {name: i for i, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    for name in class_folders(root):
        if name not in number:
            raise InputError(f"{root / name}: this class does not appear among the training classes")
        folder = root / name
        if subfolder and (folder / subfolder).is_dir():
            folder = folder / subfolder
        found = image_files(folder)
        if not found:
            raise InputError(f"{folder}: no images of this class")
        paths += found
        labels += [number[name]] * len(found)
    missing = sorted(set(classes) - {classes[label] for label in set(labels)})
    if missing:
        raise InputError(f"{root}: no folder for the class {missing[0]}")
    return Files(paths, np.asarray(labels, dtype=np.int64))


def cached_images(files: Files, image_size: int | None, cache_dir: Path, name: str) -> Path:
    """Path of an ``.npy`` with all images, uint8 ``[files, H, W, 3]``; decoded now unless the cache is whole and current.

    Args:
        files: what to decode.
        image_size: side to resize to, by area; without it all images must have one size.
        cache_dir: folder of all caches.
        name: shown in the progress bar and part of the cache's name.

    Raises:
        InputError: a missing, corrupt or odd-sized image (named), or a cache that cannot be written.
    """
    fingerprint = _fingerprint(files, image_size)
    place = hashlib.sha256(str(files.paths[0].parent.parent.resolve()).encode()).hexdigest()[:12]
    folder = cache_dir / f"{name}-{image_size or 'asis'}-{place}"
    if not _is_whole(folder, fingerprint):
        try:
            with _one_at_a_time(folder):
                if not _is_whole(folder, fingerprint):  # another process has not been faster
                    _build(files, image_size, folder, fingerprint, name)
        except OSError as error:
            raise InputError(f"cannot write the image cache {folder} ({error}); choose another place with --cache_dir") from error
    return folder / _IMAGES


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process builds this cache: it would decode twice, and replace what the first already reads."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint(files: Files, image_size: int | None) -> str:
    """Names, sizes and times of all files and how they are decoded."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {image_size}".encode())
    for path in files.paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: missing image ({error.strerror})") from error
        digest.update(f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_whole(folder: Path, fingerprint: str) -> bool:
    try:
        meta = parsed((folder / _META).read_bytes())
        whole = meta["fingerprint"] == fingerprint and isinstance(meta["pixels"], str)
        return whole and meta["checksum"] == _checksum(folder / _IMAGES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def stored_digest(images: Path) -> str:
    """What ``pixels_digest`` gives for a file that ``cached_images`` returned; taken when it was decoded."""
    return json.loads((images.parent / _META).read_text())["pixels"]


def pixels_digest(images: np.ndarray) -> str:
    """Hex digest of the shape and the pixels of uint8 images; of a memory map a few at a time are read."""
    digest = _begun_digest(images.shape)
    for start in range(0, len(images), _CHUNK):
        digest.update(images[start : start + _CHUNK].tobytes())
    return digest.hexdigest()


def _begun_digest(shape: Sequence[int]) -> hashlib.blake2b:
    return hashlib.blake2b(json.dumps(list(shape)).encode(), digest_size=DIGEST_BYTES)


def _build(files: Files, image_size: int | None, folder: Path, fingerprint: str, name: str) -> None:
    """Write the cache beside its place and move it there whole."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pixels = _write_images(files, image_size, temporary / _IMAGES, name)
        meta = {"fingerprint": fingerprint, "checksum": _checksum(temporary / _IMAGES), "images": len(files.paths), "pixels": pixels}
        (temporary / _META).write_text(json.dumps(meta))
        if folder.exists():  # stale or broken
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_images(files: Files, image_size: int | None, target: Path, name: str) -> str:
    """Write the ``.npy`` and return the digest of its pixels."""
    chunks = _decoded_chunks(files.paths, image_size, name)
    first = next(chunks)
    shape = (len(files.paths), *first.shape[1:])
    digest = _begun_digest(shape)
    with target.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        # Plain writes, not a memory map: on a full disk a write is an error and a map is a crash.
        for chunk in itertools.chain([first], chunks):
            content = chunk.tobytes()
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _decoded_chunks(paths: Sequence[Path], image_size: int | None, name: str) -> Iterator[np.ndarray]:
    size: tuple[int, ...] | None = None
    begun, told = time.perf_counter(), False
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        tqdm(total=len(paths), desc=f"decoding {name}", unit="img", disable=None) as bar,
    ):
        for start in range(0, len(paths), _CHUNK):
            part = paths[start : start + _CHUNK]
            images = list(pool.map(lambda path: decode_image(path, image_size), part))
            for path, image in zip(part, images, strict=True):
                size = size or image.shape
                if image.shape != size:
                    raise InputError(
                        f"{path}: {image.shape[1]}x{image.shape[0]} pixels where others have {size[1]}x{size[0]}; "
                        "--image_size N brings all to one size"
                    )
            bar.update(len(part))
            passed, done = time.perf_counter() - begun, start + len(part)
            if bar.disable and not told and passed > _PATIENCE and done < len(paths):  # the bar, where there is no terminal
                told = True
                print(f"decoding {len(paths)} images, once: {passed / done * (len(paths) - done):.0f} s to go", file=sys.stderr)
            yield np.stack(images)


def decode_image(path: Path, image_size: int | None) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of one file, resized by area to a square if ``image_size`` is given; ``InputError`` names a bad file."""
    try:
        with Image.open(path) as image:
            # The header says it before any memory is taken; Pillow itself only warns up to twice that size.
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(f"{path}: {image.width}x{image.height} pixels are more than an image of a data set has ({_MOST_PIXELS})")
            rgb = _eight_bits(image, path).convert("RGB")
            if image_size is not None and rgb.size != (image_size, image_size):
                rgb = rgb.resize((image_size, image_size), Image.Resampling.BOX)
            return np.asarray(rgb)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that Pillow can read") from error
    # Pillow raises nearly anything on damaged files, depending on the format.
    except Exception as error:
        raise InputError(f"{path}: corrupt image ({error})") from error


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Pillow would clip deeper pixels to 255 instead of scaling them."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: pixels of type {image.mode} have no known range; save it with 8 or 16 bits a channel")
    return image

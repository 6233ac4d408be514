"""Image folders: finding the files, and decoding them once into a verified cache.

A cache is valid for the content of its files. Files of a small set are read at each start; those of
a large one are read again only if a name, size, time or inode has changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from utils.errors import InputError
from utils.storage.files import locked

_CACHE_FORMAT = 4
_CHUNK = 512  # images decoded between writes
_SMALL = 2**28  # up to so many bytes are read at each start, in well under a second
_SETTLED = 2.0  # seconds after which a further change alters a file's times on any file system
DIGEST_BYTES = 16
_MOST_PIXELS = 2**26
_PATIENCE = 3.0  # seconds of decoding or reading before a message
_IMAGES, _META = "images.npy", "meta.json"
# keys of a cache's meta.json
_COUNTS = ("transparent", "paged", "brightest")
_KNOWN = {"key", "pixels", *_COUNTS, "files_stamp", "images_stamp"}

T = TypeVar("T")


@dataclass(frozen=True)
class Files:
    """Image files in a fixed order, each with its class number; ``left_out`` are the other visible
    entries beside them."""

    paths: list[Path]
    labels: np.ndarray  # int64 [files]
    left_out: tuple[Path, ...] = ()


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in ``root``, without hidden ones; ``InputError`` if none."""
    if not root.is_dir():
        raise InputError(f"no such folder: {root}")
    names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise InputError(f"no class folders in {root}")
    return names


def _sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in ``folder`` and its other visible entries, each sorted by name."""
    extensions = Image.registered_extensions()
    images: list[Path] = []
    others: list[Path] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        # Broken links stay, so that opening them raises an error with their name. Pipes do not:
        # opening one would block.
        is_file = entry.is_file() or (entry.is_symlink() and not Path(entry).exists())
        if not entry.name.startswith("."):
            is_image = is_file and os.path.splitext(entry.name)[1].lower() in extensions
            (images if is_image else others).append(folder / entry.name)
    return images, others


def scan_classes(root: Path, classes: Sequence[str], *, subfolder: str = "") -> Files:
    """Files of every class folder (or its ``subfolder``, if any) under ``root``, by class, then
    name. Raises ``InputError`` for a folder not in ``classes``, an empty one, or a missing one."""
    number = {name: i for i, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    names = class_folders(root)
    left_out = [path for path in itertools.chain(*_sorted_out(root)) if not path.is_dir()]
    for name in names:
        if name not in number:
            raise InputError(
                f"{root / name}: this class does not appear among the training classes"
            )
        folder = root / name
        if subfolder and (folder / subfolder).is_dir():
            folder = folder / subfolder
        found, others = _sorted_out(folder)
        if not found:
            raise InputError(f"{folder}: no images of this class")
        paths += found
        left_out += others
        labels += [number[name]] * len(found)
    missing = sorted(set(classes) - {classes[label] for label in set(labels)})
    if missing:
        raise InputError(f"{root}: no folder for the class {missing[0]}")
    return Files(paths, np.asarray(labels, dtype=np.int64), tuple(left_out))


class Cached(NamedTuple):
    """Decoded images.

    Attributes:
        images: path of an ``.npy``, uint8 ``[files, H, W, 3]``.
        digest: ``pixels_digest`` of the images.
        transparent: number of images with transparent parts, which are now black.
        paged: number of images with further pages or frames, which are left out.
        brightest: the highest value of all pixels.
    """

    images: Path
    digest: str
    transparent: int
    paged: int
    brightest: int


def cached_images(files: Files, image_size: int | None, cache_dir: Path, name: str) -> Cached:
    """All images in one file, decoded now unless the cache is intact and matches the files.

    Args:
        image_size: side in pixels to resize to, by area; None requires images of one size.
        name: shown in the progress bar and part of the cache's name.

    Raises:
        InputError: a missing, corrupt or differently sized image (named), a cache that cannot be
            written, or too large a size.
    """
    if image_size is not None and image_size**2 > _MOST_PIXELS:
        raise InputError(
            f"--image_size {image_size} exceeds the limit for an image ({_MOST_PIXELS} pixels)"
        )
    place = hashlib.sha256(os.fsencode(files.paths[0].parent.parent.resolve())).hexdigest()[:12]
    folder = cache_dir / f"{name}-{image_size or 'asis'}-{place}"
    now = _Content(files.paths, image_size, name)
    if (meta := _current(folder, now)) is None:
        try:
            with _one_at_a_time(folder):
                meta = _current(folder, now)  # another process may have been faster
                if meta is None:
                    meta = _build(folder, now)
        except OSError as error:
            raise InputError(
                f"cannot write the image cache {folder} ({error}); choose another place with"
                " --cache_dir"
            ) from error
    else:
        _remember(folder, meta)
    return Cached(folder / _IMAGES, meta["pixels"], *(meta[name] for name in _COUNTS))


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process builds this cache: a second one would decode again and replace
    what the first already reads."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(folder.with_name(f".{folder.name}.lock"))
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- validation of the cache


class _Content:
    """The current content of the files, read lazily and once."""

    def __init__(self, paths: Sequence[Path], image_size: int | None, name: str) -> None:
        self.paths, self.image_size, self.name = paths, image_size, name
        # taken before reading, so that a later change shows in the next stamp
        self.stamp, self.nbytes = _stamp(paths, _SETTLED)

    @functools.cached_property
    def key(self) -> str:
        chunks = _by_chunks(
            _file_digest,
            self.paths,
            f"checking {self.name}",
            f"checking {len(self.paths)} images for changes",
        )
        return self.key_of(itertools.chain.from_iterable(chunks))

    def key_of(self, digests: Iterable[bytes]) -> str:
        """The cache key of the files' digests, in order, and of how they are decoded."""
        how = f"{_CACHE_FORMAT} {self.image_size} ".encode()
        return hashlib.blake2b(how + b"".join(digests), digest_size=DIGEST_BYTES).hexdigest()


def _stamp(paths: Iterable[Path], settled: float = float("-inf")) -> tuple[str | None, int]:
    """One digest of names, sizes, times and inodes, and the total bytes. The digest is None if a
    file changed within the last ``settled`` seconds: it could change again and keep its times."""
    digest, nbytes, youngest = hashlib.blake2b(digest_size=DIGEST_BYTES), 0, float("-inf")
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: missing image ({error.strerror})") from error
        times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
        digest.update(os.fsencode(path.name) + f" {stat.st_size} {times} {stat.st_ino}\n".encode())
        nbytes += stat.st_size
        youngest = max(youngest, stat.st_ctime)
    return digest.hexdigest() if time.time() - youngest >= settled else None, nbytes


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(
                file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)
            ).digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _current(folder: Path, now: _Content) -> dict[str, Any] | None:
    """Metadata of the cache in ``folder`` with current stamps; None unless the cache is intact and
    matches the files."""
    try:
        meta = json.loads((folder / _META).read_text())
        images = np.load(folder / _IMAGES, mmap_mode="r")
    except (OSError, ValueError, EOFError, RecursionError):
        return None
    if (
        not isinstance(meta, dict)
        or set(meta) != _KNOWN
        or images.dtype != np.uint8
        or images.shape[:1] != (len(now.paths),)
    ):
        return None
    is_unchanged = (
        now.stamp is not None and now.nbytes > _SMALL and meta["files_stamp"] == now.stamp
    )
    if not is_unchanged and meta["key"] != now.key:
        return None
    images_stamp, _ = _stamp([folder / _IMAGES])
    if images.nbytes <= _SMALL or meta["images_stamp"] != images_stamp:
        if images.nbytes > _SMALL:
            print(
                f"checking {images.nbytes / 2**30:.1f} GB of decoded images in {folder}, once",
                file=sys.stderr,
            )
        if meta["pixels"] != pixels_digest(images):
            return None
    return {**meta, "files_stamp": now.stamp, "images_stamp": images_stamp}


def _remember(folder: Path, meta: Mapping[str, Any]) -> None:
    """Store the stamps of a cache that was verified by reading, to trust it by them next time."""
    # a read-only cache is verified each time
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / _META).read_text()) == meta:
            return
        with _one_at_a_time(folder):
            # unless another process has replaced it
            if json.loads((folder / _META).read_text())["key"] == meta["key"]:
                _write_meta(folder, meta)


def _write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    written = folder / f".{_META}"
    written.write_text(json.dumps(meta))
    os.replace(written, folder / _META)


def pixels_digest(images: np.ndarray) -> str:
    """Hex digest of shape and pixels of uint8 images, read in chunks to spare memory."""
    digest = _begun_digest(images.shape)
    for start in range(0, len(images), _CHUNK):
        digest.update(images[start : start + _CHUNK].tobytes())
    return digest.hexdigest()


def _begun_digest(shape: Sequence[int]) -> hashlib.blake2b:
    return hashlib.blake2b(json.dumps(list(shape)).encode(), digest_size=DIGEST_BYTES)


# ---------------------------------------------------------------- decoding


def _build(folder: Path, now: _Content) -> dict[str, Any]:
    """Write the cache to a temporary folder, move it into place, and return its metadata."""
    temporary = folder.with_name(f".{folder.name}-{os.urandom(4).hex()}")
    temporary.mkdir()  # not by tempfile, whose folders a group cannot read
    try:
        meta = _write_images(now, temporary / _IMAGES)
        meta |= {"files_stamp": now.stamp, "images_stamp": _stamp([temporary / _IMAGES])[0]}
        _write_meta(temporary, meta)
        if folder.exists():  # stale or broken
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def _write_images(now: _Content, target: Path) -> dict[str, Any]:
    """Write the ``.npy``; returns the files' key, the pixels' digest and ``_COUNTS``."""
    digests: list[bytes] = []
    transparent = paged = brightest = 0
    pixels = None
    with target.open("wb") as file:
        for chunk in _decoded_chunks(now):
            digests += chunk.digests
            transparent += chunk.transparent
            paged += chunk.paged
            brightest = max(brightest, int(chunk.images.max()))
            if pixels is None:
                shape = (len(now.paths), *chunk.images.shape[1:])
                pixels = _begun_digest(shape)
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            content = chunk.images.tobytes()
            # not a memory map: on a full disk, that would crash where a write raises an error
            file.write(content)
            pixels.update(content)
        file.flush()
        os.fsync(file.fileno())
    assert pixels is not None
    counts = dict(zip(_COUNTS, (transparent, paged, brightest), strict=True))
    return {"key": now.key_of(digests), "pixels": pixels.hexdigest(), **counts}


class _Chunk(NamedTuple):
    images: np.ndarray  # uint8 [images, H, W, 3]
    digests: list[bytes]  # of their files
    transparent: int
    paged: int


def _decoded_chunks(now: _Content) -> Iterator[_Chunk]:
    # The digest comes first: if a file changes in between, the key is outdated and does not match
    # next time.
    def work(path: Path) -> tuple[Path, bytes, Decoded]:
        return path, _file_digest(path), decode_image(path, now.image_size)

    size: tuple[int, ...] | None = None
    for done in _by_chunks(
        work, now.paths, f"decoding {now.name}", f"decoding {len(now.paths)} images, once"
    ):
        paths, digests, decoded = zip(*done, strict=True)
        images, were_transparent, were_paged = zip(*decoded, strict=True)
        for path, image in zip(paths, images, strict=True):
            size = size or image.shape
            if image.shape != size:
                raise InputError(
                    f"{path}: {image.shape[1]}x{image.shape[0]} pixels where others have"
                    f" {size[1]}x{size[0]}; --image_size N brings all to one size"
                )
        yield _Chunk(np.stack(images), list(digests), sum(were_transparent), sum(were_paged))


def _by_chunks(
    work: Callable[[Path], T], paths: Sequence[Path], title: str, told_as: str
) -> Iterator[list[T]]:
    """Apply ``work`` to each file in threads; yields results in order, by chunk. Progress is a bar
    or, without a terminal, one line with the remaining time."""
    begun, told = time.perf_counter(), False
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        tqdm(total=len(paths), desc=title, unit="img", disable=None, delay=0.5) as bar,
    ):
        for start in range(0, len(paths), _CHUNK):
            # Pillow warns about odd headers; an unreadable image raises an error
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"PIL\.")
                results = list(pool.map(work, paths[start : start + _CHUNK]))
            bar.update(len(results))
            passed, done = time.perf_counter() - begun, start + len(results)
            if bar.disable and not told and passed > _PATIENCE and done < len(paths):
                told = True
                print(
                    f"{told_as}: {passed / done * (len(paths) - done):.0f} s to go", file=sys.stderr
                )
            yield results


class Decoded(NamedTuple):
    """One image, uint8 ``[H, W, 3]``, whether it had transparent parts, which are black now, and
    whether it was the first of several pages or frames."""

    pixels: np.ndarray
    is_transparent: bool
    is_paged: bool


def decode_image(path: Path, image_size: int | None) -> Decoded:
    """Decode an image, upright by its EXIF data, and resize it by area to a square if
    ``image_size`` is given; ``InputError`` names a bad file."""
    try:
        with Image.open(path) as image:
            # The header tells before memory is allocated; Pillow itself only warns up to twice its
            # own limit.
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(
                    f"{path}: {image.width}x{image.height} pixels exceed the limit for an image"
                    f" ({_MOST_PIXELS})"
                )
            image.load()
            rgb, is_transparent = _on_black(_eight_bits(image, path))
            rgb = _upright(rgb, image)
            if image_size is not None and rgb.size != (image_size, image_size):
                rgb = rgb.resize((image_size, image_size), Image.Resampling.BOX)
            return Decoded(np.asarray(rgb), is_transparent, _has_more(image))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that Pillow can read") from error
    # Pillow raises nearly anything on damaged files, depending on the format.
    except Exception as error:
        raise InputError(f"{path}: corrupt image ({error})") from error


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Scale 16-bit pixels to 8 bits; Pillow would clip them to 255."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        grey = Image.fromarray((deep // 257).astype(np.uint8))
        if (key := image.info.get("transparency")) is not None:  # the grey that is transparent
            grey.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
        return grey
    if image.mode in ("I", "F"):
        raise InputError(
            f"{path}: pixels of type {image.mode} have no known range; save it with 8 or 16 bits a"
            " channel"
        )
    return image


def _on_black(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image in RGB, and whether it was composited on black, since the color of transparent
    pixels is arbitrary."""
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        if np.asarray(with_alpha.getchannel("A")).min() < 255:
            black = Image.new("RGBA", image.size, "black")
            return Image.alpha_composite(black, with_alpha).convert("RGB"), True
    return image.convert("RGB"), False


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Turn ``pixels`` by the EXIF orientation of ``image``, if it can be read."""
    # not by ImageOps.exif_transpose, which turns nothing if another tag is odd
    kinds = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    turns = dict(enumerate(kinds.split(), 2))
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the image is usable despite a broken header
        return pixels
    return pixels if turn is None else pixels.transpose(Image.Transpose[turn])


def _has_more(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # later frames may be damaged
        return getattr(image, "n_frames", 1) > 1
    return False

"""Atomic file writes, figures as files, and lock files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_KINDS = (".png", ".pdf", ".svg")


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure atomically as PNG, PDF or SVG, by the suffix of ``path``."""
    write_atomically(path, drawn(figure, path.suffix.lower().removeprefix(".")))


def drawn(figure: Figure, kind: str) -> bytes:
    """Render a figure as ``png``, ``pdf`` or ``svg``, with the same bytes each time. It keeps the
    layout of its first rendering."""
    import matplotlib

    buffer, undated = io.BytesIO(), {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata=undated)
    figure.set_layout_engine("none")
    return buffer.getvalue()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialize to JSON with indentation, for files that people read too."""
    return (json.dumps(content, indent=2) + "\n").encode()


def saved_bytes(content: object) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_atomically(
    path: Path, content: bytes | memoryview, before: Callable[[], None] = lambda: None
) -> None:
    """Replace ``path`` by ``content`` atomically: a reader sees the old file or the new one, even
    after a crash or on a full disk. ``before`` is called once the new content is on disk, just
    before it replaces the old file."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def locked(path: Path, timeout: float = -1) -> FileLock:
    """Acquire the lock file at ``path``, held until ``release`` or the end of this process.

    Waits for at most ``timeout`` seconds, then raises ``Timeout``; by default waits forever. On a
    file system without locks, the lock is returned unheld.
    """
    lock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError:  # no locks here, or an unwritable folder, which fails later
        pass
    return lock


def writable_folder(folder: Path, instead: str = "") -> Path:
    """Create a folder and check that it is writable, before the work whose results go there.

    Raises:
        InputError: it is not; the message suggests the flag ``instead``, if given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a unique name, since several processes may try at once
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        elsewhere = f"; {instead} writes elsewhere" if instead else ""
        raise InputError(
            f"cannot write into {folder} ({error.strerror or error}){elsewhere}"
        ) from error
    return folder


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

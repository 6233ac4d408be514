"""Files written whole or not at all, and locks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_KINDS = (".png", ".pdf", ".svg")


def write_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG, PDF or SVG, by the suffix of ``path``; whole or not at all."""
    write_atomically(path, drawn(figure, path.suffix.lower().removeprefix(".")))


def drawn(figure: Figure, kind: str) -> bytes:
    """A figure as ``png``, ``pdf`` or ``svg``, the same bytes each time."""
    import matplotlib

    buffer, undated = io.BytesIO(), {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata=undated)
    return buffer.getvalue()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """For a file that people look into too."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_atomically(
    path: Path, content: bytes | memoryview, before: Callable[[], None] = lambda: None
) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, also after a
    crash or on a full disk. ``before`` is called when the new one is on disk and the old one still
    in its place."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        before()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def locked(path: Path, timeout: float = -1) -> FileLock:
    """The lock file at ``path``, held until ``release`` or the death of this process.

    On a file system without locks it is not held. Raises ``Timeout`` if another process holds it
    for longer than ``timeout`` seconds; by default it waits.
    """
    lock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError:  # no locks here, or a folder that cannot be written, which shows later
        pass
    return lock


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def writable_folder(folder: Path, instead: str = "") -> Path:
    """Make a folder and try to write there, before the work whose results shall go there and not
    after it.

    Raises:
        InputError: that cannot be; ``instead`` is the flag that names another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a name of its own: several processes may try at once
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
        with contextlib.suppress(OSError):  # some network file systems sync no folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

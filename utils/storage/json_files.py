"""Reading and checking JSON files that anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import InputError, one_line

_FLOAT_MAX = 10**300


def parsed(text: str | bytes) -> Any:
    """Parse a JSON text; ``ValueError`` if it is invalid or nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; ``InputError`` if it cannot be read or is not an object."""
    try:
        content = parsed(_bytes(path))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return content


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; ``InputError`` names the first line that is not one."""
    rows = []
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        try:
            row = parsed(line)
        except ValueError as error:
            raise InputError(
                f"line {number} of {path} cannot be read ({one_line(error)})"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"line {number} of {path} does not hold a JSON object")
        rows.append(row)
    return rows


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise OSError("it is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """Describe how a JSON value violates a shape; None if it fits.

    Args:
        shape: a type (``float`` accepts any number, None only null), a tuple of alternatives,
            ``[shape]`` for a list of it, or a dict of shapes by name, in which a trailing ``?``
            marks an optional name and ``*`` stands for every name.
        name: name of the value in the description.
    """
    if isinstance(shape, tuple):
        fits = any(misfit(value, one) is None for one in shape)
        return None if fits else misfit(value, shape[0], name)
    kind = list if isinstance(shape, list) else dict if isinstance(shape, dict) else shape
    if not _is(value, kind):
        is_nested = isinstance(value, (dict, list))
        found = f"a {type(value).__name__}" if is_nested else repr(value)[:40]
        return f"{name or 'it'} is {found}"
    if isinstance(shape, list):
        return next(filter(None, (misfit(item, shape[0], name) for item in value)), None)
    if isinstance(shape, dict):
        shapes = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        return _misfit_within(value, shapes, f"{name}." if name else "")
    return None


def _misfit_within(value: dict[str, Any], shape: Mapping[str, Any], inside: str) -> str | None:
    for key, inner in shape.items():
        name = key if key in value else key.removesuffix("?")
        if name in value:
            wrong = misfit(value[name], inner, f"{inside}{name}")
        else:
            wrong = f"it has no {inside}{name}" if name == key else None
        if wrong:
            return wrong
    return None


def _is(value: object, kind: type | None) -> bool:
    if value is None or isinstance(value, bool):
        return kind is (None if value is None else bool)
    if kind is float and isinstance(value, int):
        return abs(value) < _FLOAT_MAX
    return kind is not None and isinstance(value, kind)

"""Dataclass fields that are command-line flags: ``--<field>``, spelled with ``_`` or ``-``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from utils.errors import InputError, require

# Groups of flags and their headings, in the order of --help.
_SUBJECTS = "stages sparsity training remedies attack data network evaluation".split()
GROUPS = {name: name for name in _SUBJECTS}
GROUPS |= {"files": "files and resuming", "hardware": "hardware and speed"}
_NO_RESULT = ("evaluation", "files", "hardware")  # groups that rarely affect a run's result
Choices = Collection[str] | Callable[[], Collection[str]]


def _flag(
    default: Any,
    text: str,
    *,
    group: str,
    metavar: str = "",
    choices: Choices = (),
    result: bool = True,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        text: help line, with the unit.
        metavar: placeholder for the value in ``--help``; by default, one for its type.
        choices: allowed values, or a function that returns them when a command line is parsed: a
            registry may have new entries by then.
        result: whether it can change the result of a run and so enters the run's hash.
    """
    told = {"group": group, "help": text, "metavar": metavar, "choices": choices, "result": result}
    return field(default=default, metadata=told)


# ``flag.attack(8.0, "radius in training, in 1/255")`` makes a flag in the group ``attack``.
flag = SimpleNamespace(
    **{name: partial(_flag, group=name, result=name not in _NO_RESULT) for name in GROUPS}
)


def allowed(f: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that a flag's field currently allows; empty if it allows any."""
    choices = f.metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


def epoch_number(text: str, epochs: int, name: str) -> int:
    """Parse an epoch: its number, or a fraction of ``epochs`` below one; raises ``InputError``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise InputError(f"{name}: {text.strip()!r} is neither an epoch nor a fraction of the run")
    return round(value * epochs) if value < 1 else int(value)


def refuse_odd_values(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for values that no command line could give, since those from a file may
    be anything."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.name in values:
            value, choices = values[f.name], f.metadata["choices"]
            types = get_args(hints[f.name]) or (hints[f.name],)
            fits = type(value) in types or (float in types and type(value) is int)
            fits = fits and (type(value) is not int or abs(value) < 2**63)
            # Not checked against a registry, which may have had more when the run was made.
            known = (*choices, f.default) if choices and isinstance(choices, tuple) else (value,)
            fits = fits and value in known
            odd = repr(value)[:40]
            odd = odd if isinstance(value, (str, float)) else f"this {type(value).__name__}"
            require(fits, f"--{f.name} cannot be {odd}")

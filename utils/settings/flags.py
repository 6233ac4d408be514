"""Fields of a dataclass that are flags of a command line: ``--<field>``, spelled with ``_`` or with
``-``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from utils.errors import InputError, require

# Groups of flags, with their headings in --help and in this order.
GROUPS = {
    name: name
    for name in (
        "stages",
        "sparsity",
        "training",
        "remedies",
        "attack",
        "data",
        "network",
        "evaluation",
    )
}
GROUPS |= {"files": "files and resuming", "hardware": "hardware and speed"}
_NO_RESULT = ("evaluation", "files", "hardware")  # groups that seldom change what a run results in
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
        default: value where the flag is not given.
        text: help line, with the unit.
        group: one of ``GROUPS``.
        metavar: what stands for the value in ``--help``; a letter for its type by default.
        choices: allowed values, looked at when a command line is read: to a registry somebody may
            have added by then.
        result: whether it can change the outcome of a run, and so belongs to the run's hash.
    """
    metadata = {
        "group": group,
        "help": text,
        "metavar": metavar,
        "choices": choices,
        "result": result,
    }
    return field(default=default, metadata=metadata)


# ``flag.attack(8.0, "radius in training, in 1/255")``: a flag of that group.
flag = SimpleNamespace(
    **{name: partial(_flag, group=name, result=name not in _NO_RESULT) for name in GROUPS}
)


def allowed(f: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that a flag's field may have now, none where any will do."""
    choices = f.metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


def epoch_number(text: str, epochs: int, name: str) -> int:
    """An epoch, given as its number or as a fraction of the run below one."""
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"{name}: {text.strip()!r} is neither an epoch nor a fraction of the run"
        ) from None
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise InputError(f"{name}: {text.strip()!r} is neither an epoch nor a fraction of the run")
    return round(value * epochs) if value < 1 else int(value)


def refuse_odd_values(kind: type[Any], values: Mapping[str, Any]) -> None:
    """``InputError`` for values that no command line would have given: what comes from a file may
    be anything."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.name in values:
            value, types, choices = (
                values[f.name],
                get_args(hints[f.name]) or (hints[f.name],),
                f.metadata["choices"],
            )
            fits = type(value) in types or (float in types and type(value) is int)
            fits = fits and (type(value) is not int or abs(value) < 2**63)
            # A registry may have had more where the run was made.
            fits = fits and (
                not isinstance(choices, tuple)
                or not choices
                or value in choices
                or value == f.default
            )
            odd = repr(value)[:40]
            odd = odd if isinstance(value, (str, float)) else f"this {type(value).__name__}"
            require(fits, f"--{f.name} cannot be {odd}")

"""Which flags could not take effect, as tables of (flags, where, why) that each script's settings
hold. A run in which one was meant would be the wrong run, so it is refused; where leaving it aside
changes nothing, the run says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from utils.errors import InputError


class Rule(NamedTuple):
    """Flags without effect.

    Attributes:
        flags: their names, separated by spaces; none where settings contradict each other whoever
            set them.
        where: of the settings, whether these are such.
        why: ``--flag has no effect with ...``, or the whole sentence of a rule without flags;
            ``{s.field}`` stands for a setting.
        harmless: whether they are left aside with a note.
    """

    flags: str
    where: Callable[[Any], bool]
    why: str
    harmless: bool = False


def left_aside(rules: Iterable[Rule], settings: object, given: Collection[str]) -> dict[str, str]:
    """The given flags that do no harm where they have no effect, each with the reason."""
    return {
        name: rule.why.format(s=settings)
        for rule in rules
        if rule.harmless and rule.where(settings)
        for name in rule.flags.split()
        if name in given
    }


def refuse(rules: Iterable[Rule], settings: object, given: Collection[str]) -> None:
    """Raise ``InputError`` for the first rule that is not harmless and is broken."""
    for rule in rules:
        if rule.harmless or not rule.where(settings):
            continue
        why = rule.why.format(s=settings)
        if not rule.flags:
            raise InputError(why)
        refuse_flags(given, rule.flags.split(), why)


def refuse_flags(given: Collection[str], flags: Iterable[str], why: str) -> None:
    """Raise ``InputError`` for the first of ``flags`` that was given."""
    for name in flags:
        if name in given:
            raise InputError(f"--{name} has no effect with {why}")

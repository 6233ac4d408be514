"""Rules for flags that could not take effect; each script's settings hold a table of them.

Such a flag is refused, since the run would not be the intended one, or ignored with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from utils.errors import InputError


class Rule(NamedTuple):
    """Flags without effect, or settings that contradict each other.

    Attributes:
        flags: names of the flags, separated by spaces; empty for a rule on settings alone.
        where: predicate on the settings, true where the rule applies.
        why: the end of ``--flag has no effect with ...``, or the whole message of a rule without
            flags; ``{s.field}`` inserts a setting.
        harmless: whether the flags are ignored with a note instead of being refused.
    """

    flags: str
    where: Callable[[Any], bool]
    why: str
    harmless: bool = False


def ignored_flags(
    rules: Iterable[Rule], settings: object, given: Collection[str]
) -> dict[str, str]:
    """The given flags that are ignored as harmless, each with the reason."""
    return {
        name: rule.why.format(s=settings)
        for rule in rules
        if rule.harmless and rule.where(settings)
        for name in rule.flags.split()
        if name in given
    }


def refuse(rules: Iterable[Rule], settings: object, given: Collection[str]) -> None:
    """Raise ``InputError`` for the first broken rule that is not harmless."""
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

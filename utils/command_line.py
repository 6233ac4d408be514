"""What command lines share: errors on one line, the nearest name for a misspelled one, and help that fits a screen."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from utils.errors import InputError

_WIDEST = 120  # of help, in characters
_COLUMN = 32  # at which the texts begin
_LONGEST_METAVAR = 30  # what is longer is said in the text
_ALIASES = {"fixed_erk": "erk", "aa": "autoattack"}  # values as the released code calls them
EXIT_CODES = """exit codes: 0 done, 2 the request cannot be carried out, 3 the run failed (what it saved stays),
            75 out of time, 130 interrupted, 143 terminated"""


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line (``InputError``), with the nearest name for a misspelled flag or value."""

    def error(self, message: str) -> NoReturn:
        # A flag has two spellings; its first one says which it is.
        raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)*: ", r"\1: ", message))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(
                self.answer(arguments, unknown) or f"unknown argument {unknown[0]}{suggestion(unknown[0], self._option_string_actions)}"
            )
        return namespace

    def answer(self, arguments: Sequence[str], unknown: Sequence[str]) -> str | None:
        """What to say of a command line with unknown arguments where that is more than the nearest name."""
        return None

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        return as_known(value, action.choices) if isinstance(value, str) and action.choices is not None else value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            message = f"invalid choice: {value!r} (choose from {', '.join(map(str, action.choices))}){suggestion(value, action.choices)}"
            raise argparse.ArgumentError(action, message)


class Help(argparse.RawDescriptionHelpFormatter):
    """Each flag in its first spelling only, and texts that use the width of the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_COLUMN)
        self._width = min(self._width, _WIDEST)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[1]  # on by default: what can be asked for is that it is off
        if action.option_strings and action.dest != "help":
            return action.option_strings[0] + (f" {action.metavar}" if action.nargs != 0 else "")
        return super()._format_action_invocation(action)


def as_known(text: str, choices: Iterable[str]) -> str:
    """The one of ``choices`` that is meant, whatever its case or by the released code's name; ``text`` itself if none is."""
    known = {name.lower(): name for name in choices}
    plain = text.lower()
    return text if text in known.values() else known.get(plain, known.get(_ALIASES.get(plain, ""), text))


def suggestion(unknown: object, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for the nearest of ``known`` whatever the dashes, or nothing."""
    plain = {name.replace("-", "_").lower(): name for name in known}
    if unknown == "gpu" and "cuda" in plain:  # the nearest by its letters is cpu
        return "; did you mean cuda?"
    near = difflib.get_close_matches(str(unknown).split("=")[0].replace("-", "_").lower(), list(plain), n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def metavar_and_text(choices: tuple[str, ...], metavar: str, text: str) -> tuple[str, str]:
    """How a value is written in help: its choices themselves if they are short, or a name with the choices in the text."""
    joined = "|".join(choices)
    if len(joined) <= _LONGEST_METAVAR:
        return joined or metavar, text
    return "NAME", f"{text}: {', '.join(choices)}"

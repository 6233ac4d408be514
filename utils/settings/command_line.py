"""Command lines: parsing into settings, one-line errors with suggestions, and compact help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_type_hints

from utils.errors import InputError, require
from utils.settings.common import IN_LEVELS, CommonSettings, S, settings_from
from utils.settings.flags import GROUPS, allowed
from utils.settings.recipes import recipe_text, recipe_values
from utils.settings.rules import ignored_flags

_WIDEST = 120  # maximum width of help, in characters
_COLUMN = 32  # where help texts begin
_LONGEST_METAVAR = 30  # longer lists of choices go into the help text
_ALIASES = {"fixed_erk": "erk", "aa": "autoattack"}  # the released code's names
EXIT_CODES = """exit codes: 0 done, 2 the request cannot be carried out,
            3 the run failed (what it saved is kept), 75 out of time,
            128 + n: stopped by signal n (130 Ctrl-C, 143 SIGTERM)"""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises one-line ``InputError`` and suggests the nearest name for a
    misspelled flag or value."""

    def error(self, message: str) -> NoReturn:
        # Name only the first of a flag's two spellings.
        raise InputError(re.sub(r"^argument (--\w+)(/--[\w-]+)*: ", r"\1: ", message))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            nearest = suggestion(unknown[0], self._option_string_actions)
            self.error(self.answer(arguments, unknown) or f"unknown argument {unknown[0]}{nearest}")
        return namespace

    def answer(self, arguments: Sequence[str], unknown: Sequence[str]) -> str | None:
        """A specific message for unknown arguments, or None to suggest the nearest name."""
        return None

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        choices = action.choices
        return as_known(value, choices) if choices and isinstance(value, str) else value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            message = (
                f"invalid choice: {value!r} (choose from"
                f" {', '.join(map(str, action.choices))}){suggestion(value, action.choices)}"
            )
            raise argparse.ArgumentError(action, message)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows only each flag's first spelling and uses the width of the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_COLUMN)
        self._width = min(self._width, _WIDEST)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            # on by default: show the flag that turns it off
            return action.option_strings[1]
        if action.option_strings and action.dest != "help":
            return action.option_strings[0] + (f" {action.metavar}" if action.nargs != 0 else "")
        return super()._format_action_invocation(action)


def as_known(text: str, choices: Iterable[str]) -> str:
    """The one of ``choices`` that ``text`` means, in any case or by the released code's name;
    ``text`` itself if there is none."""
    known = {name.lower(): name for name in choices}
    plain = text.lower()
    if text in known.values():
        return text
    return known.get(plain, known.get(_ALIASES.get(plain, ""), text))


def suggestion(unknown: object, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the nearest of ``known``, or nothing; ``-`` equals ``_``."""
    plain = {name.replace("-", "_").lower(): name for name in known}
    if unknown == "gpu" and "cuda" in plain:  # by its letters, cpu is nearer
        return "; did you mean cuda?"
    near = difflib.get_close_matches(
        str(unknown).split("=")[0].replace("-", "_").lower(), list(plain), n=1
    )
    return f"; did you mean {plain[near[0]]}?" if near else ""


def metavar_and_text(choices: tuple[str, ...], metavar: str, text: str) -> tuple[str, str]:
    """Metavar and help text of a flag: the metavar lists the choices if they are short, else the
    text does."""
    joined = "|".join(choices)
    if len(joined) <= _LONGEST_METAVAR:
        return joined or metavar, text
    return "NAME", f"{text}: {', '.join(choices)}"


# Settings without influence on the result that a resumed run nevertheless keeps.
_TAKEN_ALONG = "data cache_dir compile cuda_graphs test_every tensorboard stage1_ra".split()
_TAKEN_ALONG += ["on_collapse", "deterministic"]


def parse_settings(
    kind: type[S],
    arguments: Sequence[str],
    description: str,
    stored_settings: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> S:
    """Parse a command line into settings.

    Args:
        arguments: the command line without the program.
        stored_settings: called with the given flags, by field; returns the settings of the
            checkpoint that they name (``--pretrained``, ``--resume_dir``), or none. They are the
            values of flags that were not given.

    Raises:
        InputError: unknown flags, bad values, flags that could not take effect or contradict the
            checkpoint.
    """
    examples = "\n".join(f"  {example}" for example in kind.examples)
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=f"{description}\nA flag may be spelled with - for _.",
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=Help,
        allow_abbrev=False,
    )
    _add_flags(parser, kind)
    given = vars(parser.parse_args(arguments))
    if given.get("precision") == "auto":  # the default; a resumed run keeps its own
        del given["precision"]
    # Of a checkpoint, take what defines its result and _TAKEN_ALONG, not how it was run (--device,
    # --resume, ...).
    taken = {f.name for f in dataclasses.fields(kind) if f.metadata["result"]} | set(_TAKEN_ALONG)
    stored = {name: value for name, value in stored_settings(given).items() if name in taken}
    recipe = given.get("recipe", "paper")
    names = [f.name for f in dataclasses.fields(kind)]
    chosen = {} if stored else recipe_values(recipe, given, names)
    base = stored or {**kind.guessed(given), **chosen}
    settings = settings_from(kind, {**base, **given})
    notes = ignored_flags(settings.rules, settings, given)
    used = {name: value for name, value in given.items() if name not in notes}
    settings = settings_from(kind, {**base, **used})
    _refuse_contradictions(used, stored, settings)
    settings.refuse_wrong_units(frozenset(used))
    settings.refuse_idle(frozenset(used))
    # Not a field, which would be a flag and enter the run's hash.
    said = [f"--{name} has no effect with {why}" for name, why in notes.items()]
    said += [recipe_text(recipe, chosen)] if recipe != "paper" else []
    object.__setattr__(settings, "notes", tuple(said))
    return settings


class _Parser(OneLineParser):
    """Adds specific messages for flags that are common in other programs."""

    def error(self, message: str) -> NoReturn:
        if folder := re.fullmatch(r"argument --resume: ignored explicit argument '(.*)'", message):
            message = _RESUME.format(folder[1])
        super().error(message)

    def answer(self, arguments: Sequence[str], unknown: Sequence[str]) -> str | None:
        name, _, value = unknown[0].partition("=")
        if not name.startswith("-") and ("--resume", name) in itertools.pairwise(arguments):
            return _RESUME.format(name)
        value = value or next(iter(unknown[1:]), "")
        match name.replace("-", "_"):
            case "__sparsity":
                try:
                    kept = f" {1 - float(value):g}" if 0 <= float(value) < 1 else ""
                except ValueError:
                    kept = ""
                why = f"give the kept fraction instead: --density{kept}"
            case "__workers" | "__num_workers":
                why = "there are no workers: images are decoded once and batched on the device"
            case "__epochs":
                why = "use --epochs1 for stage 1 and --epochs2 for stage 2"
            case _:
                return None
        return f"unknown argument {name}: {why}"


_RESUME = (
    "--resume takes no folder: it resumes the run with these settings; --resume_dir {0} resumes {0}"
)


def _add_flags(parser: argparse.ArgumentParser, kind: type[CommonSettings]) -> None:
    """Add a flag for each field, in its group."""
    hints = get_type_hints(kind)
    groups = {name: parser.add_argument_group(heading) for name, heading in GROUPS.items()}
    for f in dataclasses.fields(kind):
        text = f.metadata["help"]
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        if hints[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
            text = f"no {text}" if f.default else text
        else:
            kind_of_value = next(
                t for t in (int, float, str) if t is hints[f.name] or hints[f.name] == (t | None)
            )
            options["type"] = _levels if f.name in IN_LEVELS else kind_of_value
            options["choices"] = allowed(f) or None
            letter = {int: "N", float: "X", str: "NAME"}[kind_of_value]
            options["metavar"], text = metavar_and_text(
                allowed(f), f.metadata["metavar"] or letter, text
            )
            text += "" if f.default is None else f" (default {f.default})"
        spellings = dict.fromkeys(["--" + f.name, "--" + f.name.replace("_", "-")])
        groups[f.metadata["group"]].add_argument(*spellings, help=text, **options)


def _levels(text: str) -> float:
    """Parse a length in 1/255, for argparse."""
    try:
        return float(re.sub(r"\s*/\s*255\s*$", "", text))  # 8/255 means 8
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; the unit is 1/255: give 8 for 8/255"
        ) from None


def _refuse_contradictions(
    given: Mapping[str, Any], stored: Mapping[str, Any], settings: CommonSettings
) -> None:
    """Raise ``InputError`` for a flag that contradicts the checkpoint."""
    for f in dataclasses.fields(settings):
        name = f.name
        if name not in given or not f.metadata["result"] or settings.may_differ(name):
            continue
        if name in stored:
            if name in settings.may_grow and settings.resume_dir is not None:
                fewer = (
                    f"--{name} {given[name]} contradicts the checkpoint, which has {stored[name]};"
                    " a run can only grow"
                )
                require(given[name] >= stored[name], fewer)
                continue
            # A repeated fraction is the same setting, whatever the number of epochs.
            same = _numbers(given[name]) == _numbers(stored[name])
            earlier = settings_from(type(settings), stored).canonical()
            same = same or settings.canonical()[name] == earlier[name]
            require(same, _contradiction(name, given[name], stored[name]))
        elif settings.must_match_checkpoint(name):
            raise InputError(f"--{name} has no effect with --eval")


def _numbers(value: Any) -> Any:
    """Numbers in a text, separated by commas, so that their spelling does not matter; any other
    value as it is."""
    try:
        return [float(part) for part in value.split(",")]
    except (AttributeError, ValueError):
        return value


def _contradiction(name: str, given: Any, stored: Any) -> str:
    if isinstance(given, bool):
        return (
            f"--{'' if given else 'no-'}{name} contradicts the checkpoint, which was trained"
            f" {'without' if given else 'with'} it"
        )
    return f"--{name} {given} contradicts the checkpoint, which has {stored}"

"""How a command ends early: exceptions that become one line on stderr and an exit code.

``InputError`` (exit 2): the request cannot be carried out as given; nothing was written.
``RunError`` (exit 3): a run that had begun cannot continue; what it saved stays.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any


class InputError(Exception):
    """A flag, path or file that cannot be used. The message names it and says what would help."""


class BrokenCheckpointError(InputError):
    """A checkpoint file that is truncated, corrupted, or not a checkpoint at all."""


class RunError(Exception):
    """A training run that failed half-way. The message names the step and the last good
    checkpoint."""


class Stopped(Exception):
    """A run that was asked to stop and has saved its state, or that ends because another of its
    processes does, and its exit code; ``why`` is empty if another process prints it."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


class _CtrlC:
    """Handler of SIGINT: the first raises ``KeyboardInterrupt``; later ones are ignored, so that
    they do not disturb its cleanup."""

    was_raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.was_raised:
            self.was_raised = True
            raise KeyboardInterrupt


def run_command(command: Callable[[], None]) -> int:
    """Run ``command`` and return its exit code: 0, 2 (input), 3 (failed run), 75 (time limit), 141
    (closed pipe), 128 + a signal's number (130 for Ctrl-C).

    The process must end after it: it leaves Ctrl-C without effect, and warnings as one line.
    """
    warnings.formatwarning = _warning_line
    ctrl_c = _CtrlC()
    if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
        signal.signal(signal.SIGINT, ctrl_c)
    try:
        code = _code_of(command)
        ctrl_c.was_raised = True
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _code_of(command: Callable[[], None]) -> int:
    try:
        command()
    except Stopped as stopped:
        if str(stopped):
            print(one_line(stopped), file=sys.stderr)
        return stopped.code
    except BrokenPipeError:  # the reader of a pipe left, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, RunError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    return 0


def _warning_line(message: Warning | str, *where: Any, **line: Any) -> str:
    return f"warning: {one_line(message)}\n"


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8, as in names of files, written as escapes."""
    return text.encode(errors="backslashreplace").decode()


def one_line(error: object) -> str:
    """The text of an exception on a single line."""
    return " ".join(printable(str(error)).split())


def require(condition: bool, message: str) -> None:
    """Raise ``InputError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)

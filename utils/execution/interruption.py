"""Stopping a run between two steps: a signal or a time limit asks, the run saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from utils.errors import Stopped

# EX_TEMPFAIL of sysexits.h: a shell loop or a scheduler starts such a run again
TIME_LIMIT_CODE = 75
# Schedulers warn by the last three, and a terminal that closes by SIGHUP.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)


class Interruption:
    """Whether somebody asked this process to stop: Ctrl-C, SIGTERM or its like, ``minutes`` since
    it was made, or the end of the process that started it and its like (``parent``), which could
    start them once more.

    While entered, the first signal is remembered instead of ending the process. A second Ctrl-C is
    a ``KeyboardInterrupt`` again, for those who do not want to wait for the step to end.
    """

    def __init__(self, minutes: float | None = None, parent: int | None = None) -> None:
        self._parent = parent
        self._ends_at = None if minutes is None else time.monotonic() + 60 * minutes
        self._limit = minutes
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # elsewhere Python allows no handlers
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            before = self._before.get(number)  # which ignores it in a shell's background
            signal.signal(number, before if callable(before) else signal.default_int_handler)

    def asked(self) -> Stopped | None:
        """What to leave with, if somebody asked."""
        if self._signal is not None:
            return Stopped(
                "interrupted" if self._signal == signal.SIGINT else "terminated", 128 + self._signal
            )
        if self._parent is not None and os.getppid() != self._parent:
            return Stopped("terminated, since torchrun has ended", 128 + signal.SIGTERM)
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            return Stopped(f"stopped by --time_limit {self._limit:g}", TIME_LIMIT_CODE)
        return None

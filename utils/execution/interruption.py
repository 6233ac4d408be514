"""Stopping a run between two steps, on a signal or a time limit, so that it can save and exit."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from utils.errors import Stopped

# EX_TEMPFAIL of sysexits.h, on which a shell loop or a scheduler starts the run again
TIME_LIMIT_CODE = 75
# Schedulers warn with the last three; a closing terminal sends SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)


class Interruption:
    """Tells whether this process should stop: on a signal, a time limit or the end of its parent.

    Within the context, a signal is recorded instead of ending the process. A second Ctrl-C raises
    ``KeyboardInterrupt`` as usual, for users who do not want to wait for the step to end.

    Args:
        minutes: time limit, counted from construction.
        parent: process id of torchrun; once it has ended, a new one may start the run again.
    """

    def __init__(self, minutes: float | None = None, parent: int | None = None) -> None:
        self._parent = parent
        self._ends_at = None if minutes is None else time.monotonic() + 60 * minutes
        self._limit = minutes
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python allows no handlers in other threads
        if threading.current_thread() is threading.main_thread():
            # nohup ignores the closing terminal
            ignores = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            caught = [n for n in SIGNALS if not (ignores and n == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._remember) for number in caught}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            before = self._before.get(number)  # SIG_IGN in a shell's background job
            signal.signal(number, before if callable(before) else signal.default_int_handler)

    def asked(self) -> Stopped | None:
        """The ``Stopped`` to raise if the process was asked to stop, else None."""
        if self._signal is not None:
            how = "interrupted" if self._signal == signal.SIGINT else "terminated"
            return Stopped(how, 128 + self._signal)
        if self._parent is not None and os.getppid() != self._parent:
            return Stopped("terminated, since torchrun has ended", 128 + signal.SIGTERM)
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            return Stopped(f"stopped by --time_limit {self._limit:g}", TIME_LIMIT_CODE)
        return None

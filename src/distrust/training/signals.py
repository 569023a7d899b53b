"""Requests to stop, by a signal or by the program: the run saves first.

SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and the first Ctrl-C only set a flag. The loop checks it after
each step; preparation checks it between its parts. The handler never raises for them: imports and loading run
native code, and an exception through such code may end the process. A second Ctrl-C raises KeyboardInterrupt
at once; that damages no checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from distrust.training.events import Reason

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that records signals; it handles them in the main thread only."""

    def __init__(self) -> None:
        self.signal: int | None = None  # number of the first signal
        self.asked = False  # whether set() was called
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # A signal that the process ignores (Ctrl-C of a background job) stays ignored.
            handled = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_set(self) -> bool:
        """Whether anything asks to stop."""
        return self.asked or self.signal is not None

    @property
    def reason(self) -> Reason:
        """Why an incomplete run ends; without a request it was an observer's error."""
        if self.signal is not None:
            return "signal"
        return "stop" if self.asked else "error"

    def set(self) -> None:
        """Ask to stop without a signal; from any thread."""
        self.asked = True

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # os.write, not a stream: the signal may interrupt a write to that stream. It fails if Ctrl-C also
            # ended the `tee` that reads stderr; an error raised here would end the run unsaved.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once\n")
        self.signal = self.signal or number

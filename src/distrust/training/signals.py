"""What asks a run to stop, a signal or the program itself: it saves first.

SIGTERM, SIGHUP (a terminal that was closed), SIGUSR1 and the first Ctrl-C are remembered, and the loop looks
at its next step's end; before the first step, who prepares it looks between one part and the next. The
handler itself never raises for them: importing and loading run native code, some of which ends the process
when an exception comes through it. A second Ctrl-C is a KeyboardInterrupt at once; no checkpoint is damaged
by that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A context in which signals are remembered; elsewhere than in the main thread there are none.

    Attributes:
        signal: the number of the first signal, or None.
        asked: whether :meth:`ask` was called.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # What the process was told to ignore (a job in the background: Ctrl-C) stays ignored.
            heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._remember) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_set(self) -> bool:
        """Whether anything asks to stop."""
        return self.asked or self.signal is not None

    def set(self) -> None:
        """Ask without a signal, from any thread."""
        self.asked = True

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # Not through any stream: the signal may have come in the middle of a write to it. Where Ctrl-C
            # has ended the `tee` that read along, it fails: raised here, that would end the run unsaved.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")
        self.signal = self.signal or number

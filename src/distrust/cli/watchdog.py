"""Ends a command that does not answer a signal, and names the record that takes long.

Python runs the handler of a signal, and raises KeyboardInterrupt, only between two instructions of the main
thread. Native code there, such as a tokenizer with a hostile model's rules, may never come to an end. So a
thread watches: the interpreter also writes each signal to a pipe, at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time

from distrust.activity import STOPPING, current
from distrust.errors import printable

GRACE_SECONDS = 2.0  # for the answer to a signal
SLOW_SECONDS = 5.0  # after which a record is named, and again after twice that time
_POLL_SECONDS = 1.0
_STOP = 0  # no signal has this number


class Watchdog:
    """Context manager for the main thread; in another one it does nothing, as for every signal.

    A signal is answered when the block ends. A run that makes steps may take longer: its step and save are
    waited for, unless Ctrl-C follows another signal.
    """

    _pipe: tuple[int, int] | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=self._pipe[:1], daemon=True, name="watchdog")
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        if self._pipe is None:
            return
        reading, writing = self._pipe
        signal.set_wakeup_fd(self._previous)
        os.write(writing, bytes([_STOP]))
        self._thread.join()
        os.close(reading)
        os.close(writing)

    def _watch(self, pipe: int) -> None:
        slow = _SlowRecord()
        received: list[tuple[int, float]] = []  # signals and when they arrived
        while True:
            if select.select([pipe], [], [], _POLL_SECONDS)[0]:
                numbers = os.read(pipe, select.PIPE_BUF)
                if _STOP in numbers:
                    return
                received += [(number, time.monotonic()) for number in numbers if number in STOPPING]
            ending = received
            if current.has_steps_to_lose:
                ending = [(number, when) for number, when in received[1:] if number == signal.SIGINT]
            if ending and time.monotonic() - ending[0][1] >= GRACE_SECONDS:
                _end(ending[0][0])
            slow.report()


class _SlowRecord:
    """Names the record that is being read or tokenized if that takes long."""

    def __init__(self) -> None:
        self._location: object = None
        self._began = self._due = 0.0

    def report(self) -> None:
        """Print a line if it is due."""
        location, now = current.location, time.monotonic()
        if location is not self._location:
            self._location, self._began, self._due = location, now, now + SLOW_SECONDS
        elif location is not None and now >= self._due:
            seconds = now - self._began
            self._due = now + seconds
            line = printable(f"distrust: still at {location}, for {seconds:.0f} s")
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(line, file=sys.stderr, flush=True)


def _end(number: int) -> None:
    if current.location is None and os.environ.get("RANK", "0") != "0":  # rank 0 says it
        os._exit(128 + number)
    line = f"distrust: ended by {signal.Signals(number).name}, without an answer for {GRACE_SECONDS:g} s"
    if current.location is not None:
        line += f", at {current.location}"
    if not current.has_steps_to_lose:
        line += ": nothing is lost"
    with contextlib.suppress(OSError):  # not a stream: the main thread may hold its lock
        os.write(2, f"\n{printable(line)}\n".encode())
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # shows the cursor, which a progress bar hides
    os._exit(128 + number)


def _forget_in_child() -> None:
    """A forked child has the pipe, but its signals are not the parent's."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)

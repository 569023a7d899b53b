"""What a run claims of its process: its only run, the signals that stop it, and a thread if it is awaited.

SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and the first Ctrl-C only set a flag. The loop checks it after
each step; preparation checks it between its parts. The handler never raises for them: imports and loading run
native code, and an exception through such code may end the process. A second Ctrl-C raises KeyboardInterrupt
at once; that damages no checkpoint. If a part of the preparation does not end, ``cli/watchdog.py`` ends the
command.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from distrust.activity import STOPPING, current, in_notebook
from distrust.errors import RunInProgress, warn
from distrust.training.events import Reason

WAKING_SECONDS = 0.5

Result = TypeVar("Result")


class _RunLock:
    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)  # the parent's run is not the child's

    def renew(self) -> None:
        self.lock, self.holder = threading.Lock(), Path()


_run_lock = _RunLock()


@contextlib.contextmanager
def exclusive_run(out: Path) -> Iterator[None]:
    """Context manager in which no other run of this process can start.

    A framework's random generators and thread count belong to the process. Two simultaneous runs would seed
    and use the same generators, so neither would be reproducible.

    Raises:
        RunInProgress: another run is in progress.
    """
    lock = _run_lock.lock
    if not lock.acquire(blocking=False):
        raise RunInProgress(
            f"{out}: cannot start, because this process is training {_run_lock.holder}. Random generators "
            "and threads belong to the process, so two runs at once would change each other's results: wait "
            "for it, or start another process",
            out=_run_lock.holder,
        )
    try:
        _run_lock.holder, current.warned = out, set()
        yield
    finally:
        current.warned = None
        lock.release()


class StopRequest:
    """Context manager that records signals; it handles them in the main thread only."""

    def __init__(self) -> None:
        self.signal: int | None = None  # number of the first signal
        self.asked = False  # whether set() was called
        self.notice: str | None = None  # the preemption notice that asked to stop, and when it came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        current.has_steps_to_lose = False
        if threading.current_thread() is threading.main_thread():
            # A signal that the process ignores (Ctrl-C of a background job) stays ignored.
            handled = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
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

    def merge(self, signal: int, *, asked: bool) -> None:
        """Add what another process of the run was asked."""
        self.signal, self.asked = self.signal or signal or None, self.asked or asked

    def set(self) -> None:
        """Ask to stop without a signal; from any thread."""
        self.asked = True

    def give_notice(self, notice: str) -> None:
        """Ask to stop as SIGTERM does, because of a preemption notice; from any thread."""
        if self.signal is None:
            self.notice, self.signal = notice, signal.SIGTERM
            warn(f"preemption notice ({notice}): the run saves after this step, and ends")

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # all ranks get it
            # os.write, not a stream: the signal may interrupt a write to that stream. It fails if Ctrl-C also
            # ended the `tee` that reads stderr; an error raised here would end the run unsaved.
            with contextlib.suppress(OSError):
                is_before = not current.has_steps_to_lose
                when = b"before the first step: nothing is lost" if is_before else b"after this step"
                again = b"interrupt" if in_notebook() else b"press Ctrl-C"
                os.write(2, b"\nstopping %b; %b again to exit at once\n" % (when, again))
        self.signal = self.signal or number


async def run_in_thread(work: Callable[[], Result], *, ask_to_stop: Callable[[], None]) -> Result:
    """Run ``work`` in a new thread while the event loop continues.

    When cancelled, once or repeatedly, it calls ``ask_to_stop`` and still waits for ``work``; then it raises
    CancelledError, or what ``work`` raised. So no run ends unsaved.
    """
    import asyncio  # only if it is used

    cancelled: asyncio.CancelledError | None = None
    # A pool of its own: reused threads keep the number of torch threads that earlier work has set.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="train") as pool:
        waiting = asyncio.wrap_future(pool.submit(contextvars.copy_context().run, work))
        try:
            while not waiting.done():
                try:
                    # Python runs signal handlers in the main thread only, and not every signal wakes it up.
                    await asyncio.wait([waiting], timeout=WAKING_SECONDS)
                except asyncio.CancelledError as error:
                    cancelled = cancelled or error
                    ask_to_stop()
        finally:
            ask_to_stop()  # if the event loop is torn down; otherwise the thread has already ended
    result = waiting.result()
    if cancelled is not None:
        raise cancelled
    return result

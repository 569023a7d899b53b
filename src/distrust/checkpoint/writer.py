"""The background thread, its one slot, and its errors.

One thread a save, and at most one at a time: a second save waits for the first. The thread is no daemon, so
a program that ends waits for it. An error that nobody has taken by then is printed.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from distrust.errors import SaveFailed


class PendingSave:
    """A save that goes on in the background: wait for it, or await it.

    Cancelling what awaits it does not cancel the write.
    """

    def __init__(self, path: Path, future: Future[Path], copied: threading.Event) -> None:
        self._path = path
        self._future = future
        self._copied = copied
        self._taken = False

    @property
    def path(self) -> Path:
        """Where the checkpoint will stand."""
        return self._path

    @property
    def done(self) -> bool:
        """Whether the write has ended, well or not."""
        return self._future.done()

    @property
    def has_unreported_error(self) -> bool:
        """Whether it failed and nobody has been told."""
        return self.done and not self._taken and self._future.exception() is not None

    def add_done_callback(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the write has ended, on its thread, or at once."""
        self._future.add_done_callback(lambda _: then())

    def print_unreported_error(self) -> None:
        """Print the error that nobody has been told of."""
        if self.has_unreported_error:
            print(f"distrust: a save in the background failed: {self._future.exception()}", file=sys.stderr)

    def wait(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is durable, and return its path.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            SaveFailed: if it could not be written.
            TimeoutError: if it is still being written after ``timeout``.
        """
        error = self._future.exception(timeout)
        if error is not None:
            self._taken = True
            raise error
        return self._path

    def wait_copied(self) -> None:
        """Wait until everything is copied: from then on the arrays may change."""
        self._copied.wait()

    def __await__(self) -> Generator[Any, None, Path]:
        import asyncio

        try:
            return (yield from asyncio.wrap_future(self._future).__await__())
        except Exception:  # not CancelledError: a cancelled caller was not told how the write ended
            self._taken = True
            raise


class BackgroundWriter:
    """Runs one save at a time on a thread of its own."""

    def __init__(self) -> None:
        self._pending: PendingSave | None = None

    @property
    def idle(self) -> bool:
        """Whether no write is under way."""
        return self._pending is None or self._pending.done

    def when_idle(self, then: Callable[[], None]) -> None:
        """Call ``then`` at the end of the write under way, on its thread, or at once if there is none."""
        if self._pending is None:
            then()
        else:
            self._pending.add_done_callback(then)

    def start(self, path: Path, *, copy: Callable[[], None], write: Callable[[], None]) -> PendingSave:
        """Run ``copy`` and then ``write`` in the background. The caller has called :meth:`settle` before.

        Where no thread can be started, they have run when this returns.
        """
        future: Future[Path] = Future()
        copied, begin = threading.Event(), threading.Event()
        pending = PendingSave(path, future, copied)
        # From now on it cannot be cancelled, by whoever awaits it either.
        future.set_running_or_notify_cancel()
        given_up = False

        def run() -> None:
            # Not before the slot is taken: a save that nobody knows of would be overwritten by the next one.
            # An interrupt may come just before it is told to begin; so it looks for itself, too.
            while not begin.wait(1.0) and self._pending is not pending and not given_up:
                pass
            if given_up:
                # Nobody was given it; the slot, which may have been taken already, is free again.
                copied.set()
                future.set_result(path)
                return
            try:
                try:
                    copy()
                finally:
                    copied.set()
                write()
            except BaseException as error:  # handed to whoever waits; printed at exit if nobody does
                future.set_exception(error)
            else:
                future.set_result(path)

        try:
            threading.Thread(target=run, name=f"save {path.name}", daemon=False).start()
            self._take(pending)
        except RuntimeError:
            given_up = True

            def both() -> None:
                copy()
                write()

            return self.run(path, both)
        except BaseException:
            given_up = True
            raise
        finally:
            begin.set()
        return pending

    def run(self, path: Path, write: Callable[[], None]) -> PendingSave:
        """Run ``write`` now; a failure to save is told like one in the background."""
        try:
            write()
        except SaveFailed as error:
            return self.record_failure(path, error)
        return self._finish(path, None)

    def record_failure(self, path: Path, error: SaveFailed) -> PendingSave:
        """A save that failed before anything could be written; told like one in the background."""
        return self._finish(path, error)

    def _finish(self, path: Path, error: SaveFailed | None) -> PendingSave:
        future: Future[Path] = Future()
        copied = threading.Event()
        copied.set()
        if error is None:
            future.set_result(path)
        else:
            future.set_exception(error)
        pending = PendingSave(path, future, copied)
        self._take(pending)
        return pending

    def _take(self, pending: PendingSave) -> None:
        self._pending = pending
        _unreported_at_exit().add(pending)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            SaveFailed: if it, or the one before, failed and nobody has been told yet.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            if not pending.done or pending.has_unreported_error:
                pending.wait()
        finally:
            if pending.done:  # an interrupted wait leaves the slot taken
                self._pending = None
                _unreported_at_exit().discard(pending)


@functools.cache
def _unreported_at_exit() -> set[PendingSave]:
    """The saves that nobody has settled yet.

    One hook for them all: the interpreter keeps the place of one that was taken back, and looks at it again
    whenever the next one is.
    """
    unsettled: set[PendingSave] = set()

    def report() -> None:
        for pending in unsettled:
            pending.print_unreported_error()

    atexit.register(report)
    return unsettled

"""The background thread of a manager or of a FileSaver: one save at a time, and its errors.

Each save has its own thread, and the next save waits for it. The thread is not a daemon, so a program waits
for its save before it exits. An error that no call has raised by then is printed.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrust.errors import ConfigError, SaveFailed

if TYPE_CHECKING:
    from distrust.checkpoint.remote.mirror import MirrorWriter


class PendingSave:
    """A save in the background: wait for it, or await it. Cancelling the caller does not cancel the write."""

    def __init__(self, path: Path, future: Future[Path], copied: threading.Event) -> None:
        self._path = path
        self._future = future
        self._copied = copied
        self._error_raised = False  # until then the next save or close raises it
        self.mirror: MirrorWriter | None = None  #: of the manager that saves it

    @property
    def path(self) -> Path:
        """The path of the checkpoint."""
        return self._path

    @property
    def done(self) -> bool:
        """Whether the write has ended, successfully or not."""
        return self._future.done()

    @property
    def has_failed(self) -> bool:
        """Whether the write has ended without success."""
        return self.done and self._future.exception() is not None  # `done` first: exception() waits

    @property
    def has_unreported_error(self) -> bool:
        """Whether it failed and no call has raised the error."""
        return self.has_failed and not self._error_raised

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the write has ended, on its thread; at once if it already has."""
        self._future.add_done_callback(lambda _: callback())

    def wait(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is durable, and return its path.

        Args:
            timeout: seconds; None waits without a limit.

        Raises:
            SaveFailed: if it could not be written.
            TimeoutError: if it is still being written after ``timeout``.
        """
        error = self._future.exception(timeout)  # does not raise the error itself, only TimeoutError
        if error is not None:
            self._error_raised = True
            raise error
        return self._path

    def wait_mirrored(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint, or a newer one that makes it needless, is in the manager's mirror.

        Args:
            timeout: seconds; None waits without a limit.

        Raises:
            SaveFailed: if it could not be written; TakenOver if another writer has taken over the mirror.
            TimeoutError: if it is not there after ``timeout``.
            RemoteError: if its upload was given up.
            ConfigError: if the manager has no mirror.
        """
        end = None if timeout is None else time.monotonic() + timeout
        path = self.wait(timeout)
        if self.mirror is None:
            raise ConfigError(f"{path}: its manager has no mirror: give it mirror=URL")
        self.mirror.wait(path, end if end is None else max(0.0, end - time.monotonic()))
        return path

    def wait_copied(self) -> None:
        """Wait until all arrays are copied; after that they may change."""
        self._copied.wait()  # set by the thread, after an error too

    def __await__(self) -> Generator[Any, None, Path]:
        import asyncio  # heavy: only for callers that already use it

        try:
            # wrap_future shields: the write began, so its future cannot be cancelled.
            return (yield from asyncio.wrap_future(self._future).__await__())
        except Exception:  # not CancelledError: a cancelled caller did not learn how the write ended
            self._error_raised = True
            raise


class BackgroundWriter:
    """Runs one save at a time, each on its own thread."""

    def __init__(self) -> None:
        self._pending: PendingSave | None = None

    @property
    def idle(self) -> bool:
        """Whether no write is in progress."""
        return self._pending is None or self._pending.done

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the write in progress ends, on its thread; at once if there is none."""
        if self._pending is None:
            callback()
        else:
            self._pending.add_done_callback(callback)

    def start(self, path: Path, *, copy: Callable[[], None], write: Callable[[], None]) -> PendingSave:
        """Run ``copy`` and then ``write`` in the background. The caller has called :meth:`wait` before.

        If no thread can be started, they have run when this returns.
        """
        future: Future[Path] = Future()
        copied, begin = threading.Event(), threading.Event()
        pending = PendingSave(path, future, copied)
        future.set_running_or_notify_cancel()  # from now on nobody can cancel it
        abandoned = False

        def copy_and_write() -> None:
            try:
                copy()
            finally:
                copied.set()  # after an error too: wait_copied must return
            write()

        def run() -> None:
            # Begin only when the save is registered: the next save would overwrite one that is not. An
            # interrupt may come before `begin` is set, so check the registration too.
            while not begin.wait(1.0) and self._pending is not pending and not abandoned:
                pass
            try:
                if not abandoned:  # else no caller has it; but it may have the slot, so it must be done
                    copy_and_write()
            except BaseException as error:  # raised by the next call that waits, or printed at exit
                future.set_exception(error)
            else:
                future.set_result(path)

        try:
            # Not a daemon: the interpreter waits for it before it exits.
            threading.Thread(target=run, name=f"save {path.name}", daemon=False).start()
            self._register(pending)
        except RuntimeError:  # no thread can be started
            abandoned = True
            return self.run(path, copy_and_write)
        except BaseException:
            abandoned = True
            raise
        finally:
            begin.set()  # in every case: the thread must end
        return pending

    def run(self, path: Path, write: Callable[[], object]) -> PendingSave:
        """Run ``write`` now; a failure to save is reported like one in the background."""
        try:
            write()
        except SaveFailed as error:
            return self.finish(path, error)
        return self.finish(path)

    def finish(self, path: Path, error: SaveFailed | None = None) -> PendingSave:
        """Register a save that has ended; its error is reported like one in the background."""
        future: Future[Path] = Future()
        copied = threading.Event()
        copied.set()
        if error is None:
            future.set_result(path)
        else:
            future.set_exception(error)
        pending = PendingSave(path, future, copied)
        self._register(pending)
        return pending

    def _register(self, pending: PendingSave) -> None:
        self._pending = pending
        _unreported_at_exit().add(pending)

    def wait(self) -> None:
        """Wait for the save in progress; raise SaveFailed if it failed and no call has raised that yet."""
        pending = self._pending
        if pending is None:
            return
        try:
            if not pending.done or pending.has_unreported_error:  # raised once, not again at each save
                pending.wait()
        finally:
            if pending.done:  # an interrupted wait leaves the slot taken
                self._pending = None
                _unreported_at_exit().discard(pending)


@functools.cache
def _unreported_at_exit() -> set[PendingSave]:
    """The saves whose errors are printed at exit."""
    # One hook for all: the interpreter never frees the slot of an unregistered hook, and scans all slots when
    # one is unregistered.
    pending_saves: set[PendingSave] = set()

    def report() -> None:
        for pending in pending_saves:
            if pending.has_unreported_error:
                error = pending._future.exception()
                print(f"distrust: a save in the background failed: {error}", file=sys.stderr)

    atexit.register(report)
    return pending_saves

"""Work on all cores, for calls that release the GIL while they run: reads, copies, digests."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

MAX_THREADS = 16  # memory bandwidth is exhausted before the cores of a large machine are
_MIN_BYTES_FOR_THREADS = 8 << 20


def cores() -> int:
    """Return how many cores this process may use, at most :data:`MAX_THREADS`."""
    available = getattr(os, "sched_getaffinity", None)  # containers and taskset restrict it; macOS has none
    return min(MAX_THREADS, len(available(0)) if available else os.cpu_count() or 1)


class Threads:
    """Threads that all call ``work``, and begin only once the last of them was started.

    Fewer than ``count`` where the system refuses more. They are daemons: whoever needs their work waits for
    it, and if an interrupt loses the reference to one, the program can still exit.
    """

    def __init__(self, work: Callable[[], None], count: int) -> None:
        self._all_started = threading.Event()
        self._cancelled = False
        self._started: list[tuple[threading.Thread, threading.Event]] = []
        try:
            for _ in range(count):
                ended = threading.Event()
                thread = threading.Thread(target=self._work_when_started, args=(work, ended), daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit on threads: those that started are enough
                    break
                self._started.append((thread, ended))
        except BaseException:
            self._cancelled = True  # the caller gets no reference to join the threads that started
            raise
        finally:
            self._all_started.set()

    def __len__(self) -> int:
        return len(self._started)

    def join(self) -> None:
        """Wait until all have ended."""
        for thread, ended in self._started:
            # The event first: an interrupted join makes Python 3.11 and 3.12 consider a running thread ended.
            ended.wait()
            thread.join()

    def _work_when_started(self, work: Callable[[], None], ended: threading.Event) -> None:
        try:
            self._all_started.wait()
            if not self._cancelled:
                work()
        finally:
            ended.set()


class WorkerPool:
    """Threads that run tasks in the order of their submission.

    Where the system gives no thread, :meth:`submit` runs the task itself. After a task failed, no other one
    is started, and :meth:`submit` and :meth:`finish` raise its error.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]
        self._tasks = queue.SimpleQueue()  # None ends one thread
        self._error: BaseException | None = None
        self._threads = Threads(self._work, threads)

    def submit(self, task: Callable[[], None]) -> threading.Event:
        """Queue a task; return an event that is set when it has run, failed or been skipped."""
        self._raise_error()
        finished = threading.Event()
        self._tasks.put((task, finished))
        if not len(self._threads):
            self._tasks.put(None)
            self._work()
        return finished

    def finish(self) -> None:
        """Wait for every task, and raise the first error."""
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """End the threads and wait for them: only then may the memory that they work on be freed."""
        for _ in range(len(self._threads)):
            self._tasks.put(None)
        self._threads.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None:
            task, finished = entry
            try:
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error  # raised in the submitting thread
            finished.set()  # always: the submitter may be waiting to reuse the task's memory


_local = threading.local()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this thread copy without others: they would take the cores that train."""
    _local.is_alone = True
    try:
        yield
    finally:
        _local.is_alone = False


def worthwhile_threads(nbytes: int) -> int:
    """Return how many threads to copy ``nbytes`` with: for little data, starting threads costs more."""
    return cores() if nbytes >= _MIN_BYTES_FOR_THREADS and not getattr(_local, "is_alone", False) else 1


def run(work: Callable[[Item], None], items: Sequence[Item], *, threads: int) -> None:
    """Call ``work`` for every item, on ``threads`` threads, the caller's included.

    When this returns or raises, no thread works on an item any more. Raises the error of the earliest item
    that failed, unless there was an interrupt; later items may not have been started.
    """
    pending = iter(enumerate(items))
    lock = threading.Lock()
    errors: dict[int, BaseException] = {}  # by index of the item; -1 for an interrupt

    def process_items() -> None:
        while not errors:
            with lock:
                index, item = next(pending, (-1, None))
            if index < 0:
                return
            try:
                work(item)  # type: ignore[arg-type]  # None only at the end
            except BaseException as error:
                errors[index if isinstance(error, Exception) else -1] = error

    try:
        workers = Threads(process_items, min(threads, len(items)) - 1)
    except BaseException as error:
        errors[-1] = error  # stops the threads that started
        raise
    while True:
        try:
            process_items()
            workers.join()
            break
        except BaseException as error:
            # An interrupt between two items or during the join: stop, but still wait for the threads.
            errors[-1] = error
    if errors:
        try:
            # Items are started in order: no earlier one was skipped, so the choice is deterministic.
            raise errors[min(errors)]
        finally:
            errors.clear()  # breaks the cycle error -> traceback -> this frame, which keeps the items alive

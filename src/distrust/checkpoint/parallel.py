"""Work on all cores, for calls that let go of the interpreter while they run: reads, copies, digests."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

#: A memory's bandwidth is spent before the cores of a large machine are.
MAX_THREADS = 16
_BYTES_FOR_THREADS = 8 << 20


def cores() -> int:
    """How many cores this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return min(MAX_THREADS, len(available(0)) if available else os.cpu_count() or 1)


class Crew:
    """Threads that take tasks in the order in which they were put.

    Args:
        threads: how many.

    Raises:
        BaseException: from :meth:`put` and :meth:`finish`, if a task failed; none is begun after that.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]
        self._tasks = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, task: Callable[[], None]) -> threading.Event:
        """Have a task done; returns what is set when it is."""
        self._raise_error()
        done = threading.Event()
        self._tasks.put((task, done))
        return done

    def finish(self) -> None:
        """Wait until everything is done."""
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """Let the threads end, and wait for them: what they work on may go after that."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (waiting := self._tasks.get()) is not None:
            task, done = waiting
            try:
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
            done.set()


def worthwhile_threads(nbytes: int) -> int:
    """How many threads to copy so many bytes with: for a few, starting threads costs more than they save."""
    return cores() if nbytes >= _BYTES_FOR_THREADS else 1


def run(work: Callable[[Item], None], items: Sequence[Item], *, threads: int) -> None:
    """Call ``work`` for every item, the caller's thread included.

    Raises:
        BaseException: of the earliest item that failed; later ones may not have been begun.
    """
    taken = iter(enumerate(items))
    lock = threading.Lock()
    failed: dict[int, BaseException] = {}

    def take_items() -> None:
        while not failed:
            with lock:
                index, item = next(taken, (-1, None))
            if index < 0:
                return
            try:
                work(item)  # type: ignore[arg-type]  # None only at the end
            except BaseException as error:
                failed[index] = error

    others = [threading.Thread(target=take_items) for _ in range(min(threads, len(items)) - 1)]
    for thread in others:
        thread.start()
    take_items()
    for thread in others:
        thread.join()
    if failed:
        # Items are taken in order: no earlier one can have been left out.
        raise failed[min(failed)]

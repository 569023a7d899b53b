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


class Threads:
    """Threads that do the same work, and begin when all of them are there.

    Whoever needs their work waits for it, so they are daemons: should an interrupt lose sight of one, the
    program still ends.

    Args:
        work: is called by each of them.
        count: how many; fewer where the system gives no more.
    """

    def __init__(self, work: Callable[[], None], count: int) -> None:
        self._complete = threading.Event()
        self._given_up = False
        self._started: list[tuple[threading.Thread, threading.Event]] = []
        try:
            for _ in range(count):
                ended = threading.Event()
                thread = threading.Thread(target=self._work_when_complete, args=(work, ended), daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    break
                self._started.append((thread, ended))
        except BaseException:
            self._given_up = True  # nobody would know of those that are there
            raise
        finally:
            self._complete.set()

    def __len__(self) -> int:
        return len(self._started)

    def join(self) -> None:
        """Wait until all have ended."""
        for thread, ended in self._started:
            # First: a join that is interrupted makes Python 3.11 and 3.12 take a running thread for ended.
            ended.wait()
            thread.join()

    def _work_when_complete(self, work: Callable[[], None], ended: threading.Event) -> None:
        try:
            self._complete.wait()
            if not self._given_up:
                work()
        finally:
            ended.set()


class WorkerPool:
    """Threads that take tasks in the order in which they were put.

    Args:
        threads: how many; fewer where the system gives no more. Where it gives none, who puts a task does it.

    Raises:
        BaseException: from :meth:`put` and :meth:`finish`, if a task failed; none is begun after that.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]
        self._tasks = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads = Threads(self._work, threads)

    def submit(self, task: Callable[[], None]) -> threading.Event:
        """Have a task done; returns what is set when it is."""
        self._raise_error()
        done = threading.Event()
        self._tasks.put((task, done))
        if not len(self._threads):
            self._tasks.put(None)
            self._work()
        return done

    def finish(self) -> None:
        """Wait until everything is done."""
        self.stop()
        self._raise_error()

    def stop(self) -> None:
        """Let the threads end, and wait for them: what they work on may go after that."""
        for _ in range(len(self._threads)):
            self._tasks.put(None)
        self._threads.join()

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

    Whatever is raised, nobody works on an item any more when this returns.

    Raises:
        BaseException: of the earliest item that failed; later ones may not have been begun. An interrupt
            comes before all of them.
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
                failed[index if isinstance(error, Exception) else -1] = error

    try:
        others = Threads(take_items, min(threads, len(items)) - 1)
    except BaseException as error:
        failed[-1] = error  # nobody begins anything
        raise
    while True:
        try:
            take_items()
            others.join()
            break
        except BaseException as error:
            failed[-1] = error  # between two items, or while waiting: no other one is begun
    if failed:
        try:
            # Items are taken in order: no earlier one can have been left out.
            raise failed[min(failed)]
        finally:
            failed.clear()  # an error that is held here, where it is raised, would hold what was worked on

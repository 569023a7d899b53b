"""Work on many threads: the first failure counts, nothing hangs, and nothing goes on behind."""

from __future__ import annotations

import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust.checkpoint import parallel
from distrust.checkpoint.parallel import WorkerPool

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Wrong(Exception):
    """Of one item."""


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.sets(st.integers(0, 39)), st.integers(1, 6))
def test_the_earliest_failure_is_raised_and_everything_before_it_was_done(count, wrong, threads):
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item in wrong:
            raise Wrong(item)

    first = min((item for item in wrong if item < count), default=None)
    if first is None:
        parallel.run(work, range(count), threads=threads)
        assert sorted(begun) == list(range(count))
    else:
        with pytest.raises(Wrong) as caught:
            parallel.run(work, range(count), threads=threads)
        assert caught.value.args == (first,)
        assert set(begun) >= set(range(first))
        assert len(begun) == len(set(begun))


def test_the_earliest_failure_is_raised_though_a_later_one_came_first():
    later = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            later.wait()
        if item == 1:
            later.set()
        raise Wrong(item)

    with pytest.raises(Wrong) as caught:
        parallel.run(work, range(5), threads=2)
    assert caught.value.args == (0,)


@pytest.mark.usefixtures("no_collector")
def test_an_interrupt_while_others_work_stops_them_and_waits_for_them():
    """Were they left to themselves, they would go on writing to memory that belongs to the next save."""
    main = threading.main_thread()
    first, interrupted = threading.Semaphore(), threading.Event()
    ended = []

    def work(item: int) -> None:
        if threading.current_thread() is not main:
            if first.acquire(blocking=False):
                signal.pthread_kill(main.ident, signal.SIGINT)
            interrupted.wait()
        ended.append(item)

    def on_interrupt(*_) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            parallel.run(work, range(1_000_000), threads=3)
        assert len(ended) < 1_000_000
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_not_lost_behind_the_failure_of_an_item():
    main = threading.main_thread()
    failed = threading.Event()

    def work(item: int) -> None:
        if threading.current_thread() is main:
            failed.wait()
            raise KeyboardInterrupt
        failed.set()
        raise Wrong(item)

    with pytest.raises(KeyboardInterrupt):
        parallel.run(work, range(2), threads=2)


@pytest.fixture
def few_threads(monkeypatch):
    """The system gives so many threads and no more."""

    def allow(number: int) -> None:
        honest = threading.Thread.start
        left = iter(range(number))

        def start(thread: threading.Thread) -> None:
            if next(left, None) is None:
                raise RuntimeError("can't start new thread")
            honest(thread)

        monkeypatch.setattr(threading.Thread, "start", start)

    return allow


@pytest.mark.parametrize("number", [0, 1, 2])
def test_where_the_system_gives_fewer_threads_those_do_it(few_threads, number):
    few_threads(number)
    done = []

    parallel.run(done.append, range(20), threads=4)

    assert sorted(done) == list(range(20))


def test_a_crew_of_fewer_than_asked_for_does_it_all(few_threads):
    few_threads(1)
    done: list[int] = []
    crew = WorkerPool(3)
    for item in range(5):
        crew.submit(lambda item=item: done.append(item))
    crew.finish()
    assert done == list(range(5))


def test_where_there_are_no_threads_who_puts_a_task_does_it(few_threads):
    few_threads(0)
    crew, done = WorkerPool(2), []
    assert crew.submit(lambda: done.append(1)).is_set()
    assert crew.submit(lambda: done.append(2)).is_set()
    crew.finish()
    assert done == [1, 2]


def test_a_crew_begins_nothing_after_a_failure_and_says_that_everything_is_over():
    crew = WorkerPool(1)
    begin, begun = threading.Event(), []

    def fail() -> None:
        begin.wait()
        raise Wrong

    tasks = [crew.submit(fail), *(crew.submit(lambda: begun.append(1)) for _ in range(5))]
    begin.set()
    for task in tasks:
        task.wait()  # nobody who waits for one waits for ever
    assert begun == []
    with pytest.raises(Wrong):
        crew.submit(lambda: None)
    with pytest.raises(Wrong):
        crew.finish()


def test_a_crew_can_be_stopped_more_than_once():
    crew = WorkerPool(2)
    done = crew.submit(lambda: None)
    crew.finish()
    assert done.is_set()
    crew.stop()
    crew.finish()

"""Work on many threads: the earliest error is raised, nothing hangs, and no thread continues afterwards."""

from __future__ import annotations

import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust.checkpoint import parallel
from distrust.checkpoint.parallel import WorkerPool

pytestmark = pytest.mark.usefixtures("no_thread_left")


class ItemError(Exception):
    """Raised by the work on one item."""


@settings(max_examples=100)
@given(st.integers(0, 40), st.sets(st.integers(0, 39)), st.integers(1, 6))
def test_earliest_error_is_raised_and_every_item_before_it_was_processed(count, failing, threads):
    processed = []

    def work(item: int) -> None:
        processed.append(item)
        if item in failing:
            raise ItemError(item)

    first = min((item for item in failing if item < count), default=None)
    if first is None:
        parallel.run(work, range(count), threads=threads)
        assert sorted(processed) == list(range(count))
    else:
        with pytest.raises(ItemError) as caught:
            parallel.run(work, range(count), threads=threads)
        assert caught.value.args == (first,)
        assert set(processed) >= set(range(first))
        assert len(processed) == len(set(processed))


def test_earliest_error_is_raised_even_if_a_later_item_failed_first():
    later_failed = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            later_failed.wait()
        if item == 1:
            later_failed.set()
        raise ItemError(item)

    with pytest.raises(ItemError) as caught:
        parallel.run(work, range(5), threads=2)
    assert caught.value.args == (0,)


@pytest.mark.usefixtures("no_collector")
def test_interrupt_stops_the_other_threads_and_waits_for_them():
    """Otherwise they would continue to write to memory that the next save uses."""
    main_thread = threading.main_thread()
    first, interrupted = threading.Semaphore(), threading.Event()
    processed = []

    def work(item: int) -> None:
        if threading.current_thread() is not main_thread:
            if first.acquire(blocking=False):
                signal.pthread_kill(main_thread.ident, signal.SIGINT)
            interrupted.wait()
        processed.append(item)

    def on_interrupt(*_) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            parallel.run(work, range(1_000_000), threads=3)
        assert len(processed) < 1_000_000
    finally:
        signal.signal(signal.SIGINT, previous)


def test_interrupt_takes_precedence_over_the_error_of_an_item():
    main_thread = threading.main_thread()
    failed = threading.Event()

    def work(item: int) -> None:
        if threading.current_thread() is main_thread:
            failed.wait()
            raise KeyboardInterrupt
        failed.set()
        raise ItemError(item)

    with pytest.raises(KeyboardInterrupt):
        parallel.run(work, range(2), threads=2)


@pytest.fixture
def limit_threads(monkeypatch):
    """Make the system refuse further threads after a given number."""

    def allow(number: int) -> None:
        original = threading.Thread.start
        permits = iter(range(number))

        def start(thread: threading.Thread) -> None:
            if next(permits, None) is None:
                raise RuntimeError("can't start new thread")
            original(thread)

        monkeypatch.setattr(threading.Thread, "start", start)

    return allow


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_threads_than_requested_process_every_item(limit_threads, number):
    limit_threads(number)
    processed = []

    parallel.run(processed.append, range(20), threads=4)

    assert sorted(processed) == list(range(20))


def test_pool_with_fewer_threads_than_requested_runs_every_task(limit_threads):
    limit_threads(1)
    results: list[int] = []
    pool = WorkerPool(3)
    for item in range(5):
        pool.submit(lambda item=item: results.append(item))
    pool.finish()
    assert results == list(range(5))


def test_pool_without_threads_runs_tasks_in_submit(limit_threads):
    limit_threads(0)
    pool, results = WorkerPool(2), []
    assert pool.submit(lambda: results.append(1)).is_set()
    assert pool.submit(lambda: results.append(2)).is_set()
    pool.finish()
    assert results == [1, 2]


def test_pool_starts_no_task_after_an_error_and_releases_everyone_who_waits():
    pool = WorkerPool(1)
    begin, results = threading.Event(), []

    def fail() -> None:
        begin.wait()
        raise ItemError

    tasks = [pool.submit(fail), *(pool.submit(lambda: results.append(1)) for _ in range(5))]
    begin.set()
    for task in tasks:
        task.wait()  # must not hang
    assert results == []
    with pytest.raises(ItemError):
        pool.submit(lambda: None)
    with pytest.raises(ItemError):
        pool.finish()


def test_pool_can_be_stopped_more_than_once():
    pool = WorkerPool(2)
    finished = pool.submit(lambda: None)
    pool.finish()
    assert finished.is_set()
    pool.stop()
    pool.finish()

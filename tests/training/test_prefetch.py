"""Prefetched values: each once, in order, one step ahead, in a thread that ends with the steps."""

from __future__ import annotations

import threading
from contextlib import closing
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.training.step import prefetch


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 30))
def test_each_value_is_computed_once_in_order(first, count, requests):
    computed, last = [], first + count
    with closing(prefetch(lambda step: computed.append(step) or step * 10, first=first, last=last)) as steps:
        values = [*islice(steps, requests)]
    expected = [*range(first, last + 1)][:requests]
    assert values == [(step, step * 10) for step in expected]
    # The next one is computed ahead, and none after the last; none before the first request.
    assert computed == [*range(first, min(last, first + requests) + 1)][: requests and requests + 1]


def test_next_value_is_computed_in_the_background():
    started = {step: threading.Event() for step in (1, 2, 3)}
    by = {}

    def make(step):
        by[step] = threading.current_thread()
        started[step].set()

    with closing(prefetch(make, first=1, last=3)) as steps:
        next(steps)
        assert started[2].wait(10)  # not requested yet
        assert not started[3].is_set()
    assert by[2] is not threading.current_thread()


def test_errors_are_raised_when_the_value_is_requested():
    def make(step):
        if step % 3 == 0:
            raise OSError(f"no {step}")
        return step

    with closing(prefetch(make, first=1, last=7)) as steps:
        assert [next(steps), next(steps)] == [(1, 1), (2, 2)]  # 3 fails in the background
        with pytest.raises(OSError, match="no 3"):
            next(steps)
    with closing(prefetch(make, first=6, last=7)) as steps, pytest.raises(OSError, match="no 6"):
        next(steps)


@pytest.mark.parametrize("fails", [False, True])
def test_exit_ends_the_thread(fails):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("distrust-prefetch")]

    slow = threading.Event()
    try:
        with closing(prefetch(lambda step: step == 2 and slow.wait(0.05), first=1, last=5)) as steps:
            next(steps)
            assert len(threads()) == 1
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert threads() == []

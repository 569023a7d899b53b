"""Prefetched values equal those that are computed on demand."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.training.prefetch import Prefetcher


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 20))
def test_values_do_not_depend_on_the_order(steps, last):
    computed = []
    with Prefetcher(lambda step: computed.append(step) or step * 10, last=last) as prefetcher:
        assert [prefetcher.get(step) for step in steps] == [step * 10 for step in steps]
    assert max(computed, default=0) <= max([last, *steps])


def test_each_value_is_computed_once_in_order():
    computed = []
    with Prefetcher(lambda step: computed.append(step) or step, last=9) as prefetcher:
        assert [prefetcher.get(step) for step in range(3, 10)] == list(range(3, 10))
    assert computed == list(range(3, 10))  # and none after the last


def test_next_value_is_computed_in_the_background():
    started = {step: threading.Event() for step in (1, 2, 3)}
    by = {}

    def make(step):
        by[step] = threading.current_thread()
        started[step].set()

    with Prefetcher(make, last=3) as prefetcher:
        prefetcher.get(1)
        assert started[2].wait(10)  # not requested yet
        assert not started[3].is_set()
    assert by[1] is threading.current_thread()
    assert by[2] is not threading.current_thread()


def test_errors_are_raised_by_get():
    def make(step):
        if step % 3 == 0:
            raise OSError(f"no {step}")
        return step

    with Prefetcher(make, last=7) as prefetcher:
        assert [prefetcher.get(1), prefetcher.get(2)] == [1, 2]  # 3 fails in the background
        with pytest.raises(OSError, match="no 3"):
            prefetcher.get(3)
        assert prefetcher.get(3 + 1) == 4
        with pytest.raises(OSError, match="no 6"):
            prefetcher.get(6)  # at once


@pytest.mark.parametrize("fails", [False, True])
def test_exit_ends_the_thread(fails):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("distrust-prefetch")]

    slow = threading.Event()
    try:
        with Prefetcher(lambda step: step == 2 and slow.wait(0.05), last=5) as prefetcher:
            prefetcher.get(1)
            assert len(threads()) == 1
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert threads() == []

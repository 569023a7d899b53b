"""Progress goes into a checkpoint as arrays and comes back as it was."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrust.training.progress import HISTORY, Progress

rows = st.lists(st.tuples(*[st.floats(width=64)] * len(HISTORY)), max_size=6)


def bits(history):
    return [[np.float64(value).tobytes() for value in row] for row in history]


@given(rows)
def test_history_round_trip(history):
    arrays = Progress(history=history).history_arrays()
    assert list(arrays) == list(HISTORY)
    assert all(values.dtype == np.float64 and values.shape == (len(history),) for values in arrays.values())
    back = Progress()
    back.restore_history(arrays)
    assert bits(back.history) == bits(history)


def test_the_arrays_are_copies():
    progress = Progress(history=[(1.0, 2.0, 3.0, 4.0, 5.0)])
    arrays = progress.history_arrays()
    progress.history.append((6.0,) * 5)
    assert arrays["loss"].tolist() == [1.0]
    arrays["loss"][0] = math.inf
    assert progress.history[0][0] == 1.0


def test_nobody_shares_a_history():
    assert Progress().history is not Progress().history
    assert Progress().metrics is not Progress().metrics

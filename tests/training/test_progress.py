"""Progress survives the round trip through the arrays of a checkpoint."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrust.option_values import STEP_METRICS
from distrust.training.progress import Progress

rows = st.lists(st.tuples(*[st.floats(width=64)] * len(STEP_METRICS)), max_size=6)


def step_of(row):
    metrics = dict(zip(STEP_METRICS, row, strict=True))
    return SimpleNamespace(step=1, tokens=1, seconds=0.0, **metrics)


def progress_of(history):
    progress = Progress()
    for row in history:
        progress.add_step(step_of(row))
    return progress


def bits(arrays):
    return {name: values.tobytes() for name, values in arrays.items()}


@given(rows)
def test_history_round_trip(history):
    arrays = progress_of(history).history_arrays()
    assert list(arrays) == list(STEP_METRICS)
    assert all(values.dtype == np.float64 and values.shape == (len(history),) for values in arrays.values())
    assert bits(arrays) == {
        name: np.array(column, np.float64).tobytes()
        for name, column in zip(
            STEP_METRICS, zip(*history, strict=True) if history else [()] * 5, strict=True
        )
    }
    back = Progress()
    back.restore_history(arrays)
    assert bits(back.history_arrays()) == bits(arrays)


def test_the_arrays_are_copies():
    progress = progress_of([(1.0, 2.0, 3.0, 4.0, 5.0)])
    arrays = progress.history_arrays()
    progress.add_step(step_of([6.0] * len(STEP_METRICS)))
    assert arrays["loss"].tolist() == [1.0]
    arrays["loss"][0] = math.inf
    assert progress.history_arrays()["loss"].tolist() == [1.0, 6.0]


def test_histories_are_not_shared():
    assert Progress().history is not Progress().history
    assert Progress().metrics is not Progress().metrics

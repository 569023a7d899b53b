"""A micro-batch as the torch engine takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_batches import flat_batch

from distrust import DistrustWarning, activity
from distrust.data import IGNORED
from distrust.engines.torch import row
from distrust.engines.torch.row import Row


@pytest.fixture(autouse=True)
def ordinary_memory(monkeypatch):
    """Page-locked memory needs a device: ordinary memory takes its place."""
    monkeypatch.setattr(row, "_page_locked_bytes", lambda count: torch.empty(count, dtype=torch.uint8))


def test_ordinary_memory_where_none_can_be_page_locked(monkeypatch, recwarn):
    monkeypatch.undo()  # this machine has no device, so torch cannot lock memory
    monkeypatch.setattr(activity.current, "warned", set())
    batch = flat_batch([3, 4], np.arange(7), np.arange(7), np.ones(7))
    with pytest.warns(DistrustWarning, match="^memory cannot be page-locked .*slower$") as caught:
        rows = [Row.of(batch, page_locked=True) for _ in range(3)]
    assert len(caught) == 1
    for prepared in rows:
        assert prepared.block is None
        assert np.array_equal(prepared.to(torch.device("cpu")).input_ids, batch.input_ids)


@example([[False]], True, 0)  # no token is trained
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_row_has_the_trained_tokens_and_those_that_predict_them(sequences, page_locked, seed):
    trained = np.concatenate([[False, *flags] for flags in sequences])
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**40, len(trained))
    weights = np.where(trained, rng.random(len(trained)), 0)
    lengths = [1 + len(flags) for flags in sequences]
    batch = flat_batch(lengths, ids, np.where(trained, ids, IGNORED), weights)
    prepared = Row.of(batch, page_locked=page_locked)
    assert (prepared.block is not None) == page_locked
    assert Row.of(prepared) is prepared
    on_device = prepared.to(torch.device("cpu"))
    expected = {
        "input_ids": batch.input_ids,
        "positions": batch.positions,
        "predictor_index": np.flatnonzero(trained) - 1,
        "targets": ids[trained],
        "token_weights": batch.weights[trained],
        "cu_seqlens": batch.cu_seqlens,
    }
    assert on_device._asdict().keys() == expected.keys()
    for name, array in expected.items():
        tensor = getattr(on_device, name)
        assert tensor.numpy().dtype == array.dtype, name
        assert np.array_equal(tensor.numpy(), array), name
    assert np.array_equal(prepared.trained_sequences, batch.sequences[trained])
    assert np.array_equal(prepared.trained_weights, batch.weights[trained])

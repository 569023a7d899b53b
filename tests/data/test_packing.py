"""Examples -> rows: each example once, no row over its capacity, and few rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust.data import concatenate, one_per_row, pack

seeds = st.integers(0, 2**63)


@st.composite
def packings(draw):
    """Example numbers, their lengths, and the options of ``pack``."""
    capacity = draw(st.integers(1, 50))
    lengths = np.array(draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), np.int64)
    examples = draw(st.integers(0, 99)) + 3 * np.arange(len(lengths), dtype=np.int64)
    return examples, lengths, {"capacity": capacity, "seed": draw(seeds), "window": draw(st.integers(1, 80))}


def rows_of(packed_rows):
    return [packed_rows.examples(np.array([row])).tolist() for row in range(len(packed_rows))]


def next_fit(lengths, capacity):
    """The number of rows of next fit."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return rows


@given(packings())
def test_each_example_is_in_one_row_with_room_for_it(case):
    examples, lengths, options = case
    length_of = dict(zip(examples.tolist(), lengths.tolist(), strict=True))
    rows = rows_of(pack(examples, lengths, **options))
    assert sorted(example for row in rows for example in row) == examples.tolist()
    sums = [sum(length_of[example] for example in row) for row in rows]
    assert all(0 < total <= options["capacity"] for total in sums)


@given(packings())
def test_rows_are_a_function_of_lengths_capacity_and_seed(case):
    examples, lengths, options = case
    np.random.seed(len(examples))  # the global generator has no influence
    assert rows_of(pack(examples, lengths, **options)) == rows_of(pack(examples.copy(), lengths, **options))


@given(packings())
def test_the_number_of_rows_is_within_the_bound_of_best_fit(case):
    """At most 3/2 of the optimum for best fit decreasing (Simchi-Levi, 1994), in each window."""
    examples, lengths, options = case
    capacity = options["capacity"]
    rows = len(pack(examples, lengths, **{**options, "window": len(examples)}))
    assert rows >= math.ceil(lengths.sum() / capacity)
    assert rows >= (lengths > capacity / 2).sum()
    # No two rows fit into one, so on average they are more than half full.
    assert rows <= max(1, 2 * lengths.sum() / capacity)
    assert rows <= 3 / 2 * next_fit(sorted(lengths, reverse=True), capacity)


def test_rows_of_many_examples_are_almost_full():
    rng = np.random.default_rng(0)
    lengths = np.minimum(1024, rng.lognormal(5, 0.9, 10_000).astype(np.int64) + 2)
    examples = np.arange(len(lengths))
    rows = len(pack(examples, lengths, capacity=1024, seed=0))
    fewest = math.ceil(lengths.sum() / 1024)
    assert rows <= 1.01 * fewest
    assert next_fit(lengths, 1024) > 1.1 * fewest  # the task is not trivial


def test_windows_are_sampled_from_all_examples():
    """If a window has as many examples as fit a row, each row is a window, not a run of neighbours."""
    examples = np.arange(60)
    by_seed = [rows_of(pack(examples, np.ones(60, np.int64), capacity=6, seed=s, window=6)) for s in (0, 1)]
    assert by_seed[0] != by_seed[1]
    for rows in by_seed:
        assert len(rows) == 10
        assert sum(sorted(row) == list(range(min(row), min(row) + 6)) for row in rows) < 2
    # In windows of one, nothing is packed.
    assert len(pack(examples, np.ones(60, np.int64), capacity=6, seed=0, window=1)) == 60


def test_the_rows_have_not_changed():
    lengths = np.array([5, 1, 4, 2, 3, 6, 2])
    rows = rows_of(pack(np.arange(10, 17), lengths, capacity=7, seed=3))
    assert rows == [[15, 11], [10, 16], [12, 14], [13]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example of 8 tokens does not fit a row of 7"):
        pack(np.arange(2), np.array([7, 8]), capacity=7, seed=0)


@given(st.lists(packings(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_concatenated_parts_keep_their_order(cases):
    parts = [pack(examples, lengths, **options) for examples, lengths, options in cases]
    joined = concatenate(parts)
    assert rows_of(joined) == [row for part in parts for row in rows_of(part)]
    assert len(joined) == sum(map(len, parts))


def test_rows_of_one_example_each():
    packed_rows = one_per_row(np.array([4, 2, 9]))
    assert len(packed_rows) == 3
    assert rows_of(packed_rows) == [[4], [2], [9]]
    assert packed_rows.examples(np.array([2, 0, 2])).tolist() == [9, 4, 9]

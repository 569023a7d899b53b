"""Sampling order: complete epochs, random access, and the published generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data.sampler import MAX_SEED, EpochSampler, permutation
from distrust.errors import ConfigError

seeds = st.integers(0, MAX_SEED)
M = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def reference(n, seed, epoch):
    """The documented formula in exact integers."""
    state = mix(mix((seed + GAMMA) & M) ^ epoch)
    return sorted(range(n), key=lambda i: mix((state + GAMMA * (i + 1)) & M))


def test_the_order_has_not_changed():
    assert permutation(10, seed=0, epoch=0).tolist() == [6, 7, 1, 2, 9, 0, 5, 8, 3, 4]
    assert permutation(10, seed=0, epoch=1).tolist() == [9, 6, 3, 7, 5, 1, 4, 0, 2, 8]
    assert permutation(10, seed=2**63, epoch=2**40).tolist() == [2, 7, 6, 4, 3, 0, 9, 5, 8, 1]


def test_the_reference_is_splitmix64():
    # The first two outputs of SplitMix64 from state 0, as published with it.
    assert [mix(GAMMA), mix(2 * GAMMA & M)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.integers(0, 300), seeds, st.integers(0, 2**62))
def test_the_order_follows_the_documented_formula(n, seed, epoch):
    order = permutation(n, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert order.tolist() == reference(n, seed, epoch)


@given(st.integers(1, 200), seeds, st.integers(0, 10**12))
def test_every_epoch_visits_each_row_once(n, seed, epoch):
    visited = EpochSampler(n, seed=seed).at(epoch * n, n)
    assert sorted(visited) == list(range(n))


@given(
    st.integers(1, 50),
    seeds,
    st.lists(st.tuples(st.integers(0, 10**15), st.integers(0, 120)), min_size=1, max_size=8),
)
def test_a_position_does_not_depend_on_earlier_calls(n, seed, calls):
    sampler = EpochSampler(n, seed=seed)
    for start, count in calls:
        rows = sampler.at(start, count)
        assert rows.dtype == np.int64
        assert len(rows) == count
        assert np.array_equal(rows, EpochSampler(n, seed=seed).at(start, count))
        one_by_one = [permutation(n, seed=seed, epoch=p // n)[p % n] for p in range(start, start + count)]
        assert rows.tolist() == one_by_one


def test_epochs_and_seeds_differ():
    orders = {tuple(permutation(20, seed=seed, epoch=epoch)) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_every_position_is_equally_likely():
    # 4,000 epochs of 8: each row is expected 500 times at each position, with a deviation of 21.
    rows = np.stack([permutation(8, seed=5, epoch=epoch) for epoch in range(4000)])
    counts = np.stack([(rows == row).sum(0) for row in range(8)])
    assert np.abs(counts - 500).max() < 100


def test_a_far_position_is_reached_without_the_epochs_before_it():
    sampler = EpochSampler(1000, seed=1)
    for epoch in range(10**9, 10**9 + 10):  # iterating there would take days
        assert sampler.at(1000 * epoch, 8).tolist() == permutation(1000, seed=1, epoch=epoch)[:8].tolist()


def test_the_returned_array_is_a_copy():
    sampler = EpochSampler(5, seed=0)
    sampler.at(0, 5)[:] = 0
    assert sorted(sampler.at(0, 5)) == [0, 1, 2, 3, 4]


def test_invalid_arguments_are_refused():
    with pytest.raises(ConfigError, match="seed"):
        EpochSampler(5, seed=-1)
    with pytest.raises(ConfigError, match="seed"):
        permutation(5, seed=2**63 + 1, epoch=0)
    with pytest.raises(ValueError, match="row"):
        EpochSampler(0, seed=0)
    with pytest.raises(ValueError, match="negative"):
        EpochSampler(5, seed=0).at(-1, 2)
    with pytest.raises(ValueError, match="negative"):
        permutation(5, seed=0, epoch=-1)

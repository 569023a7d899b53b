"""The order: each epoch whole, each position the same whoever asks, and never another one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data import MAX_SEED, EpochSampler, permutation
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


def test_the_order_is_what_it_always_was():
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
def test_every_epoch_visits_each_sequence_once(n, seed, epoch):
    visited = EpochSampler(n, seed=seed).at(epoch * n, n)
    assert sorted(visited) == list(range(n))


@given(
    st.integers(1, 50),
    seeds,
    st.lists(st.tuples(st.integers(0, 10**15), st.integers(0, 120)), min_size=1, max_size=8),
)
def test_a_position_is_the_same_whoever_asks_and_when(n, seed, questions):
    used = EpochSampler(n, seed=seed)
    for start, count in questions:
        answer = used.at(start, count)
        assert answer.dtype == np.int64
        assert len(answer) == count
        assert np.array_equal(answer, EpochSampler(n, seed=seed).at(start, count))
        one_by_one = [permutation(n, seed=seed, epoch=p // n)[p % n] for p in range(start, start + count)]
        assert answer.tolist() == one_by_one


def test_epochs_and_seeds_differ():
    orders = {tuple(permutation(20, seed=seed, epoch=epoch)) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_every_place_is_equally_likely():
    # 4,000 epochs of 8: each sequence is expected 500 times at each place, give or take 21.
    places = np.stack([permutation(8, seed=5, epoch=epoch) for epoch in range(4000)])
    counts = np.stack([(places == sequence).sum(0) for sequence in range(8)])
    assert np.abs(counts - 500).max() < 100


def test_a_far_position_costs_what_the_first_costs():
    order = EpochSampler(1000, seed=1)
    began = time.perf_counter()
    for position in range(10**12, 10**12 + 10**6, 1000):
        order.at(position, 8)
    assert time.perf_counter() - began < 5  # 1,000 epochs begun; walking there would take years


def test_what_is_returned_can_be_changed_without_harm():
    order = EpochSampler(5, seed=0)
    order.at(0, 5)[:] = 0
    assert sorted(order.at(0, 5)) == [0, 1, 2, 3, 4]


def test_wrong_use_is_refused():
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

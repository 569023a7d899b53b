"""Mixing and splitting off: exact shares, nothing skipped or repeated, a pure function of the position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data import Corpus, EpochSampler, Location, MixtureSampler, split_off
from distrust.data.sampler import apportion, derived_seed
from distrust.errors import ConfigError

sources = st.lists(
    st.tuples(st.integers(1, 12), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4
).filter(lambda pairs: any(share for _, share in pairs))
seeds = st.integers(0, 2**63)


def order_of(pairs, seed):
    return MixtureSampler([size for size, _ in pairs], shares=[share for _, share in pairs], seed=seed)


def drawn_of(order, sizes, source, epochs):
    """What is drawn of one source in so many epochs, by its own numbers."""
    begin = sum(sizes[:source])
    drawn = order.at(0, epochs * order.rows_per_epoch)
    return drawn[(drawn >= begin) & (drawn < begin + sizes[source])] - begin


@given(sources, seeds)
def test_every_epoch_has_exactly_its_shares(pairs, seed):
    order = order_of(pairs, seed)
    sizes = [size for size, _ in pairs]
    assert order.rows_per_epoch == sum(sizes) == sum(order.counts)
    ends = np.cumsum(sizes)
    for epoch in range(3):
        drawn = order.at(epoch * order.rows_per_epoch, order.rows_per_epoch)
        found = np.bincount(np.searchsorted(ends, drawn, "right"), minlength=len(sizes))
        assert tuple(found) == order.counts


@given(sources, seeds)
def test_nothing_of_a_source_comes_again_before_all_of_it_came(pairs, seed):
    order = order_of(pairs, seed)
    sizes = [size for size, _ in pairs]
    for source, size in enumerate(sizes):
        drawn = drawn_of(order, sizes, source, epochs=5)
        for begin in range(0, len(drawn), size):
            part = drawn[begin : begin + size]
            assert len(set(part.tolist())) == len(part)


@given(sources, seeds, st.integers(0, 100), st.integers(0, 60))
def test_it_can_be_entered_anywhere(pairs, seed, start, count):
    whole = order_of(pairs, seed).at(0, start + count)
    assert np.array_equal(order_of(pairs, seed).at(start, count), whole[start:])


@given(
    st.integers(1, 10**6),
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(any),
)
def test_places_are_apportioned(places, shares):
    places += len(shares)
    counts = apportion(places, shares)
    assert sum(counts) == places
    for count, share in zip(counts, shares, strict=True):
        assert (count > 0) == (share > 0)
        # Nobody is a place away from the exact share, but for those that must have one at least.
        assert abs(count - places * share / sum(shares)) < len(shares)
    assert apportion(places, [share * 4 for share in shares]) == counts


def test_places_by_largest_remainder():
    assert apportion(10, [1, 1, 1]) == (4, 3, 3)
    assert apportion(10, [0.7, 0.3, 0]) == (7, 3, 0)
    assert apportion(10, [1e-9, 1]) == (1, 9)
    assert apportion(100, [0.5, 0.25, 0.25]) == (50, 25, 25)


def test_the_order_is_what_it_always_was():
    order = MixtureSampler([3, 2], shares=[1, 4], seed=7)
    assert order.counts == (1, 4)
    assert order.at(0, 10).tolist() == [4, 3, 3, 4, 1, 4, 3, 3, 4, 2]
    assert [derived_seed(7, stream) for stream in (0, 1)] == [8125623220279172431, 3531574278937139713]
    assert (
        order.at(10**12, 5).tolist()
        == MixtureSampler([3, 2], shares=[0.2, 0.8], seed=7).at(10**12, 5).tolist()
    )


def test_sources_are_not_in_step_with_each_other():
    order = MixtureSampler([50, 50], shares=[1, 1], seed=0)
    first, second = (drawn_of(order, [50, 50], source, epochs=1) for source in (0, 1))
    assert first.tolist() != second.tolist()
    assert first.tolist() != EpochSampler(50, seed=0).at(0, 50).tolist()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="every source needs"):
        MixtureSampler([3, 0], shares=[1, 1], seed=0)
    with pytest.raises(ValueError, match="every source needs"):
        MixtureSampler([3], shares=[1, 1], seed=0)
    with pytest.raises(ValueError, match="negative"):
        MixtureSampler([3], shares=[1], seed=0).at(-1, 1)


def corpus_of(*sizes):
    """Sources of so many examples, of a token more each time."""
    n = sum(sizes)
    lengths = np.arange(2, n + 2)
    learned = np.ones(lengths.sum(), bool)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    learned[offsets[:-1]] = False
    return Corpus(
        input_ids=np.arange(lengths.sum(), dtype=np.int32),
        loss_mask=learned,
        offsets=offsets,
        authority_weight=np.linspace(0, 0.9, n),
        provenance_entropy=np.arange(n, dtype=float),
        locations=tuple(Location("data.jsonl", line) for line in range(1, n + 1)),
        sizes=sizes,
    )


def lines(corpus):
    return [corpus.locations[example].line for example in range(len(corpus))]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 0.9), seeds)
def test_a_share_of_each_source_is_kept_out(sizes, fraction, seed):
    if sum(sizes) == len(sizes):  # one example each: nothing can be kept out
        with pytest.raises(ConfigError, match="too few"):
            split_off(corpus_of(*sizes), fraction, seed=seed)
        return
    corpus = corpus_of(*sizes)
    trained, evaluated = split_off(corpus, fraction, seed=seed)
    assert sorted(lines(trained) + lines(evaluated)) == list(range(1, len(corpus) + 1))
    assert len(evaluated) > 0
    assert all(trained.sizes)
    for size, kept, out in zip(sizes, trained.sizes, evaluated.sizes, strict=True):
        assert kept + out == size
        assert abs(out - fraction * size) <= 1
    again = split_off(corpus_of(*sizes), fraction, seed=seed)
    assert [part.fingerprint for part in again] == [trained.fingerprint, evaluated.fingerprint]


def test_another_seed_keeps_out_others():
    corpus = corpus_of(40)
    chosen = {tuple(lines(split_off(corpus, 0.25, seed=seed)[1])) for seed in range(5)}
    assert len(chosen) == 5


@given(st.sets(st.integers(0, 9), min_size=1), st.data())
def test_a_selection_is_the_corpus_of_its_examples(chosen, data):
    corpus = corpus_of(4, 6)
    part = corpus.select(sorted(chosen))
    assert part.input_ids is corpus.input_ids  # shared, not copied
    assert len(part) == len(chosen)
    assert lines(part) == [example + 1 for example in sorted(chosen)]
    assert part.sizes == (sum(e < 4 for e in chosen), sum(e >= 4 for e in chosen))
    for name in ("starts", "lengths", "loss_tokens", "authority_weight", "provenance_entropy"):
        assert np.array_equal(getattr(part, name), getattr(corpus, name)[sorted(chosen)])
    inner = data.draw(st.sets(st.integers(0, len(chosen) - 1), min_size=1))
    assert lines(part.select(sorted(inner))) == [sorted(chosen)[i] + 1 for i in sorted(inner)]


def test_a_fingerprint_tells_which_examples_of_which_sources():
    fingerprints = {
        corpus_of(10).fingerprint,
        corpus_of(4, 6).fingerprint,
        corpus_of(5, 5).fingerprint,
        corpus_of(10).select(range(10)).fingerprint,
        corpus_of(10).select(range(9)).fingerprint,
        corpus_of(10).select(range(1, 10)).fingerprint,
    }
    assert len(fingerprints) == 6

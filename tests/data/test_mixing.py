"""Mixtures and the evaluation split: exact shares, no gaps or repeats, a pure function of the position."""

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


def sampler_of(pairs, seed):
    return MixtureSampler([size for size, _ in pairs], shares=[share for _, share in pairs], seed=seed)


def sampled_rows(sampler, sizes, source, epochs):
    """The rows of one source that are sampled in some epochs, numbered within the source."""
    begin = sum(sizes[:source])
    rows = sampler.at(0, epochs * sampler.rows_per_epoch)
    return rows[(rows >= begin) & (rows < begin + sizes[source])] - begin


@given(sources, seeds)
def test_every_epoch_has_exactly_its_shares(pairs, seed):
    sampler = sampler_of(pairs, seed)
    sizes = [size for size, _ in pairs]
    assert sampler.rows_per_epoch == sum(sizes) == sum(sampler.counts)
    ends = np.cumsum(sizes)
    for epoch in range(3):
        rows = sampler.at(epoch * sampler.rows_per_epoch, sampler.rows_per_epoch)
        counts = np.bincount(np.searchsorted(ends, rows, "right"), minlength=len(sizes))
        assert tuple(counts) == sampler.counts


@given(sources, seeds)
def test_no_row_of_a_source_repeats_before_all_were_used(pairs, seed):
    sampler = sampler_of(pairs, seed)
    sizes = [size for size, _ in pairs]
    for source, size in enumerate(sizes):
        rows = sampled_rows(sampler, sizes, source, epochs=5)
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            assert len(set(part.tolist())) == len(part)


@given(sources, seeds, st.integers(0, 100), st.integers(0, 60))
def test_a_mixture_has_random_access(pairs, seed, start, count):
    expected = sampler_of(pairs, seed).at(0, start + count)
    assert np.array_equal(sampler_of(pairs, seed).at(start, count), expected[start:])


@given(
    st.integers(1, 10**6),
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(any),
)
def test_apportioned_seats_add_up(seats, shares):
    seats += len(shares)
    counts = apportion(seats, shares)
    assert sum(counts) == seats
    for count, share in zip(counts, shares, strict=True):
        assert (count > 0) == (share > 0)
        # Counts differ from the exact share by less than one, except through the minimum of one.
        assert abs(count - seats * share / sum(shares)) < len(shares)
    assert apportion(seats, [share * 4 for share in shares]) == counts


def test_seats_by_largest_remainder():
    assert apportion(10, [1, 1, 1]) == (4, 3, 3)
    assert apportion(10, [0.7, 0.3, 0]) == (7, 3, 0)
    assert apportion(10, [1e-9, 1]) == (1, 9)
    assert apportion(100, [0.5, 0.25, 0.25]) == (50, 25, 25)


def test_the_order_has_not_changed():
    sampler = MixtureSampler([3, 2], shares=[1, 4], seed=7)
    assert sampler.counts == (1, 4)
    assert sampler.at(0, 10).tolist() == [4, 3, 3, 4, 1, 4, 3, 3, 4, 2]
    even = MixtureSampler([4, 4], shares=[1, 1], seed=7)
    assert even.at(0, 16).reshape(2, -1).tolist() == [[3, 5, 4, 6, 7, 1, 2, 0], [0, 1, 7, 3, 4, 5, 2, 6]]
    assert [derived_seed(7, stream) for stream in (0, 1)] == [8125623220279172431, 3531574278937139713]
    assert (
        sampler.at(10**12, 5).tolist()
        == MixtureSampler([3, 2], shares=[0.2, 0.8], seed=7).at(10**12, 5).tolist()
    )


def test_each_epoch_samples_its_own_positions_of_a_source():
    sampler = MixtureSampler([50, 50], shares=[1, 1], seed=0)
    first, second = (sampler.at(0, 200) < 50).reshape(2, -1).tolist()
    assert first != second


def test_sources_have_independent_orders():
    sampler = MixtureSampler([50, 50], shares=[1, 1], seed=0)
    first, second = (sampled_rows(sampler, [50, 50], source, epochs=1) for source in (0, 1))
    assert first.tolist() != second.tolist()
    assert first.tolist() != EpochSampler(50, seed=0).at(0, 50).tolist()


def test_invalid_arguments_are_refused():
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
def test_a_share_of_each_source_is_split_off(sizes, fraction, seed):
    if sum(sizes) == len(sizes):  # one example each: nothing can be split off
        with pytest.raises(ConfigError, match="too few"):
            split_off(corpus_of(*sizes), fraction, seed=seed)
        return
    corpus = corpus_of(*sizes)
    trained, evaluated = split_off(corpus, fraction, seed=seed)
    assert sorted(lines(trained) + lines(evaluated)) == list(range(1, len(corpus) + 1))
    assert len(evaluated) > 0
    assert all(trained.sizes)
    for size, train_size, eval_size in zip(sizes, trained.sizes, evaluated.sizes, strict=True):
        assert train_size + eval_size == size
        # Rounded, except that one is left to train on, and one is evaluated on in total.
        is_exception = eval_size == size - 1 or len(evaluated) == 1
        assert is_exception or abs(eval_size - fraction * size) <= 0.5
    again = split_off(corpus_of(*sizes), fraction, seed=seed)
    assert [part.fingerprint for part in again] == [trained.fingerprint, evaluated.fingerprint]


def test_the_split_has_not_changed():
    """Another split would train on what was evaluated, and refuse to resume older runs."""
    corpus = corpus_of(8, 8, 3)
    splits = [split_off(corpus, fraction, seed=7)[1] for fraction in (0.3, 0.45)]
    assert [lines(evaluated) for evaluated in splits] == [[6, 8, 12, 16, 17], [3, 6, 7, 8, 9, 12, 15, 16, 17]]


def test_another_seed_splits_off_other_examples():
    corpus = corpus_of(40)
    selected = {tuple(lines(split_off(corpus, 0.25, seed=seed)[1])) for seed in range(5)}
    assert len(selected) == 5


@given(st.sets(st.integers(0, 9), min_size=1), st.data())
def test_a_selection_is_the_corpus_of_its_examples(selected, data):
    corpus = corpus_of(4, 6)
    part = corpus.select(sorted(selected))
    assert part.input_ids is corpus.input_ids  # shared, not copied
    assert len(part) == len(selected)
    assert lines(part) == [example + 1 for example in sorted(selected)]
    assert part.sizes == (sum(e < 4 for e in selected), sum(e >= 4 for e in selected))
    for name in ("starts", "lengths", "loss_tokens", "authority_weight", "provenance_entropy"):
        assert np.array_equal(getattr(part, name), getattr(corpus, name)[sorted(selected)])
    inner = data.draw(st.sets(st.integers(0, len(selected) - 1), min_size=1))
    assert lines(part.select(sorted(inner))) == [sorted(selected)[i] + 1 for i in sorted(inner)]


def test_a_fingerprint_depends_on_the_selection_and_the_sources():
    fingerprints = {
        corpus_of(10).fingerprint,
        corpus_of(4, 6).fingerprint,
        corpus_of(5, 5).fingerprint,
        corpus_of(10).select(range(10)).fingerprint,
        corpus_of(10).select(range(9)).fingerprint,
        corpus_of(10).select(range(1, 10)).fingerprint,
    }
    assert len(fingerprints) == 6

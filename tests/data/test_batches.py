"""Order -> batches: no token, no label and no weight is lost or moved on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust.data import IGNORED, Batches, Corpus, EpochSampler, Location, evaluation_batches, one_per_row


def corpus_of(examples):
    """A corpus of examples given as lists of learned flags; tokens are numbered through from 1."""
    lengths = [len(flags) for flags in examples]
    n = len(examples)
    return Corpus(
        input_ids=np.arange(1, sum(lengths) + 1, dtype=np.int32),
        loss_mask=np.array([flag for flags in examples for flag in flags], bool),
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        authority_weight=np.zeros(n),
        provenance_entropy=np.zeros(n),
        locations=tuple(Location("data.jsonl", line) for line in range(1, n + 1)),
    )


@st.composite
def runs(draw):
    flags = st.lists(st.booleans(), min_size=1, max_size=12).map(lambda flags: [False, *flags, True])
    corpus = corpus_of(draw(st.lists(flags, min_size=1, max_size=12)))
    n = len(corpus)
    weights = np.array(draw(st.lists(st.floats(0.01, 100), min_size=n, max_size=n)))
    return (
        corpus,
        Batches(
            corpus,
            weights=weights,
            distrust=weights * 10,
            sampler=EpochSampler(n, seed=draw(st.integers(0, 2**63))),
            rows=one_per_row(np.arange(n)),
            batch_size=draw(st.integers(1, 5)),
            gradient_accumulation=draw(st.integers(1, 3)),
        ),
        weights,
    )


def equal(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True)
        for name in type(a).__dataclass_fields__
    )


def check_sequences(corpus, batch, weights):
    """Each sequence has the tokens, positions, labels and weights of its example."""
    assert batch.lengths.tolist() == corpus.lengths[batch.examples].tolist()
    assert batch.cu_seqlens[-1] == len(batch.input_ids)
    for number, example in enumerate(batch.examples):
        piece = slice(corpus.offsets[example], corpus.offsets[example + 1])
        ids, trained = corpus.input_ids[piece], corpus.loss_mask[piece]
        tokens = slice(batch.cu_seqlens[number], batch.cu_seqlens[number + 1])
        assert np.array_equal(batch.input_ids[tokens], ids)
        assert np.array_equal(batch.positions[tokens], np.arange(len(ids)))
        assert np.array_equal(batch.labels[tokens], np.where(trained, ids, IGNORED))
        assert np.array_equal(batch.weights[tokens], np.where(trained, np.float32(weights[example]), 0))
        assert (batch.sequences[tokens] == number).all()
        assert batch.trained_tokens[number] == trained.sum()
    padded = batch.pad(batch.input_ids, filler=-1)
    assert padded.shape == (len(batch.examples), batch.lengths.max())
    for row, number in zip(padded, range(len(padded)), strict=True):
        ids = batch.input_ids[batch.sequences == number].tolist()
        assert row.tolist() == ids + [-1] * (padded.shape[1] - len(ids))


@given(runs(), st.integers(1, 10**9))
def test_a_batch_holds_its_examples_and_nothing_else(run, step):
    corpus, batches, weights = run
    for batch in batches.step(step):
        check_sequences(corpus, batch, weights)
        assert np.array_equal(batch.distrust, weights[batch.examples] * 10)
        assert batch.tokens == corpus.loss_tokens[batch.examples].sum()


@given(runs())
def test_no_weight_is_lost_in_collation(run):
    # Over complete epochs, the weights of all tokens add up to Σ u·n.
    corpus, batches, weights = run
    n = len(corpus)
    all_batches = [batch for step in range(1, n + 1) for batch in batches.step(step)]
    epochs = batches.rows_per_step  # n steps of G examples
    total = sum(batch.weights.sum(dtype=np.float64) for batch in all_batches)
    assert total == pytest.approx(epochs * (weights * corpus.loss_tokens).sum(), rel=1e-6)
    assert sum(batch.tokens for batch in all_batches) == epochs * corpus.loss_tokens.sum()
    assert (
        np.bincount(np.concatenate([b.examples for b in all_batches]), minlength=n).tolist() == [epochs] * n
    )


@given(runs(), st.lists(st.integers(1, 50), min_size=1, max_size=6))
@settings(max_examples=50)
def test_a_step_does_not_depend_on_earlier_calls(run, steps):
    _, batches, _ = run
    first = {step: batches.step(step) for step in steps}
    for step in reversed(steps):
        again = batches.step(step)
        assert len(again) == len(first[step])
        assert all(equal(a, b) for a, b in zip(again, first[step], strict=True))


def test_steps_follow_the_sampler_without_gap_or_repeat():
    corpus = corpus_of([[False, True]] * 7)
    sampler = EpochSampler(7, seed=3)
    batches = Batches(
        corpus,
        weights=np.ones(7),
        distrust=np.zeros(7),
        sampler=sampler,
        rows=one_per_row(np.arange(7)),
        batch_size=2,
        gradient_accumulation=3,
    )
    examples = [batch.examples for step in (1, 2, 3) for batch in batches.step(step)]
    assert [len(numbers) for numbers in examples] == [2] * 9
    assert np.array_equal(np.concatenate(examples), sampler.at(0, 18))


def test_dtypes_of_a_micro_batch():
    corpus = corpus_of([[False, True], [False, False, True]])
    (batch,) = evaluation_batches(corpus, batch_size=2)
    assert {name: getattr(batch, name).dtype.name for name in type(batch).__dataclass_fields__} == {
        "input_ids": "int64",
        "positions": "int64",
        "cu_seqlens": "int32",
        "labels": "int64",
        "weights": "float32",
        "distrust": "float64",
        "examples": "int64",
    }
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.labels.tolist() == [-100, 2, -100, -100, 5]
    assert batch.weights.tolist() == [0, 1, 0, 0, 1]


@given(runs(), st.integers(1, 5))
def test_evaluation_uses_every_example_once_and_unweighted(run, batch_size):
    corpus, _, _ = run
    batches = list(evaluation_batches(corpus, batch_size=batch_size))
    assert np.concatenate([b.examples for b in batches]).tolist() == list(range(len(corpus)))
    for batch in batches:
        check_sequences(corpus, batch, np.ones(len(corpus)))
        assert not batch.distrust.any()


def test_batches_copy_the_callers_weights():
    corpus, weights = corpus_of([[False, True]] * 2), np.array([1.0, 2.0])
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weights,
        sampler=EpochSampler(2, seed=0),
        rows=one_per_row(np.arange(2)),
        batch_size=2,
        gradient_accumulation=1,
    )
    weights[:] = 0
    (batch,) = batches.step(1)
    assert batch.weights.sum() == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": np.ones(3)}, "weights must be one per example"),
        ({"distrust": np.ones((2, 1))}, "distrust must be one per example"),
        ({"sampler": EpochSampler(3, seed=0)}, "the sampler has 3 rows, the data 2"),
        ({"batch_size": 0}, "a step needs at least one row"),
        ({"gradient_accumulation": 0}, "a step needs at least one row"),
    ],
)
def test_parts_that_do_not_match_are_refused(change, words):
    parts = {
        "weights": np.ones(2),
        "distrust": np.ones(2),
        "sampler": EpochSampler(2, seed=0),
        "rows": one_per_row(np.arange(2)),
        "batch_size": 1,
        "gradient_accumulation": 1,
    }
    with pytest.raises(ValueError, match=words):
        Batches(corpus_of([[False, True]] * 2), **{**parts, **change})


def test_the_first_step_and_the_first_batch():
    corpus = corpus_of([[False, True]])
    parts = {"weights": [1.0], "distrust": [1.0], "sampler": EpochSampler(1, seed=0)}
    rows = one_per_row(np.arange(1))
    batches = Batches(corpus, batch_size=1, gradient_accumulation=1, rows=rows, **parts)
    with pytest.raises(ValueError, match="counted from 1"):
        batches.step(0)
    with pytest.raises(ValueError, match="needs at least one example"):
        next(evaluation_batches(corpus, batch_size=0))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.data())
def test_sequences_of_an_example_are_in_one_step_and_no_batch_is_larger(counts, batch_size, data):
    """Examples of several sequences of three tokens each, with weights of their own for tokens."""
    n, total = len(counts), 3 * sum(counts)
    token_weights = np.array(
        data.draw(st.lists(st.floats(0.5, 2), min_size=total, max_size=total)), np.float32
    )
    corpus = Corpus(
        input_ids=np.arange(1, total + 1, dtype=np.int32),
        loss_mask=np.tile([False, True, True], sum(counts)),
        offsets=np.cumsum([0, *(3 * count for count in counts)], dtype=np.int64),
        authority_weight=np.zeros(n),
        provenance_entropy=np.zeros(n),
        locations=(Location("data.jsonl", 1),) * n,
        sequence_offsets=np.arange(0, total + 1, 3, dtype=np.int64),
        token_weights=token_weights,
    )
    weights = np.arange(1.0, n + 1)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=weights,
        sampler=EpochSampler(n, seed=0),
        rows=one_per_row(np.arange(n)),
        batch_size=batch_size,
        gradient_accumulation=1,
    )
    step = batches.step(1)
    assert max(len(batch.examples) for batch in step) <= batch_size
    sampled = batches.sampler.at(0, batch_size)
    expected = np.concatenate([np.arange(corpus.offsets[e], corpus.offsets[e + 1]) for e in sampled])
    ids = np.concatenate([batch.input_ids.ravel() for batch in step])
    assert np.array_equal(ids, corpus.input_ids[expected])
    example_of = np.repeat(sampled, corpus.lengths[sampled])
    factors = np.where(corpus.loss_mask[expected], weights[example_of] * token_weights[expected], 0)
    assert np.allclose(np.concatenate([batch.weights.ravel() for batch in step]), factors, rtol=1e-6)
    evaluated = list(evaluation_batches(corpus, batch_size=batch_size))
    assert np.array_equal(np.concatenate([batch.input_ids.ravel() for batch in evaluated]), corpus.input_ids)

"""The summary of example weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data.corpus import OTHER_CLASSES
from distrust.data.distribution import BINS, CLASSES, summarize_weights
from distrust.data.records import Location
from distrust.errors import DataError
from distrust.weighting import effective_sample_size

positive = st.floats(1e-6, 1e6)


def summarize(weights, *, classes=("a",), class_of=None, tokens=None, extremes=5):
    n = len(weights)
    return summarize_weights(
        authority_weight=np.linspace(0, 0.99, n),
        provenance_entropy=np.linspace(2, 0, n),
        weights=weights,
        tokens=np.ones(n, np.int64) if tokens is None else tokens,
        classes=classes,
        class_of=np.zeros(n, np.int32) if class_of is None else class_of,
        locations=[Location("data.jsonl", line) for line in range(1, n + 1)],
        effective_examples=effective_sample_size(weights) if n else 0.0,
        extremes=extremes,
    )


@given(weights=st.lists(positive, min_size=1, max_size=60))
def test_bins_hold_every_example_and_extremes_match_sorting(weights):
    summary = summarize(weights)
    assert sum(summary.counts) == summary.examples == len(weights)
    assert len(summary.edges) == len(summary.counts) + 1
    assert len(summary.counts) in (1, BINS)
    assert summary.edges[0] <= min(weights) <= max(weights) <= summary.edges[-1]
    assert list(summary.edges) == sorted(set(summary.edges))
    rising = sorted(range(len(weights)), key=lambda i: weights[i])  # stable: the first of equal ones
    falling = sorted(range(len(weights)), key=lambda i: -weights[i])
    assert [e.where for e in summary.lightest] == [f"data.jsonl:{i + 1}" for i in rising[:5]]
    assert [e.where for e in summary.heaviest] == [f"data.jsonl:{i + 1}" for i in falling[:5]]
    assert summary.quantiles["weight"][0] == min(weights)
    assert summary.quantiles["weight"][-1] == max(weights)


@given(st.data())
def test_class_summaries_add_up(data):
    n = data.draw(st.integers(1, 80))
    weights = np.array(data.draw(st.lists(positive, min_size=n, max_size=n)))
    tokens = np.array(data.draw(st.lists(st.integers(1, 500), min_size=n, max_size=n)))
    class_of = np.array(data.draw(st.lists(st.integers(0, 29), min_size=n, max_size=n)), np.int32)
    names = [f"class {i}" for i in range(30)]
    summary = summarize(weights, classes=names, class_of=class_of, tokens=tokens)

    assert sum(c.examples for c in summary.classes) == n
    assert sum(c.tokens for c in summary.classes) == summary.tokens == tokens.sum()
    assert math.isclose(sum(c.share for c in summary.classes), 1)
    named = [c for c in summary.classes if c.name != OTHER_CLASSES]
    assert [c.share for c in named] == sorted((c.share for c in named), reverse=True)
    assert len(named) == min(CLASSES, len(set(class_of.tolist())))
    for c in named:
        is_member = class_of == names.index(c.name)
        assert math.isclose(c.weight, weights[is_member].mean())
        assert math.isclose(c.share, (tokens * weights)[is_member].sum() / (tokens * weights).sum())


def test_equal_weights_have_one_bin_of_visible_width():
    summary = summarize([1.0, 1.0, 1.0], extremes=2)
    assert summary.counts == (3,)
    assert summary.edges[0] < 1 < summary.edges[1]
    assert summary.effective_examples == 3
    assert [e.where for e in summary.heaviest] == [e.where for e in summary.lightest]


def test_as_json_is_plain_json():
    summary = summarize([1.0, 2.5, 9.0], classes=("", "b"), class_of=[0, 1, 1]).as_json()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == [
        "examples",
        "tokens",
        "effective_examples",
        "quantiles",
        "edges",
        "counts",
        "classes",
        "heaviest",
        "lightest",
    ]
    assert [c["name"] for c in summary["classes"]] == ["b", ""]


def test_no_examples_and_invalid_weights_are_refused():
    for weights in ([], [1.0, 0.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(DataError):
            summarize_weights(
                authority_weight=np.zeros(len(weights)),
                provenance_entropy=np.zeros(len(weights)),
                weights=weights,
                tokens=np.ones(len(weights)),
                classes=("a",),
                class_of=np.zeros(len(weights), np.int32),
                locations=["x"] * len(weights),
                effective_examples=1.0,
            )


def test_a_million_examples_of_many_classes_are_summarized():
    """One pass for each class would take hours."""
    rng = np.random.default_rng(0)
    n = 1_000_000
    summary = summarize_weights(
        authority_weight=rng.uniform(0, 0.99, n),
        provenance_entropy=rng.uniform(0, 3, n),
        weights=rng.choice([1.0, 2.0, 3.0], n),
        tokens=rng.integers(1, 100, n),
        classes=[str(i) for i in range(100_000)],
        class_of=rng.integers(0, 100_000, n),
        locations=range(n),
        effective_examples=1.0,
    )
    assert summary.examples == n

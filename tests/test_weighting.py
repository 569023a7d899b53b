"""Example weights: properties of the formulas for any source."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.errors import ConfigError, DataError
from distrust.weighting import (
    ALPHA,
    ALPHA_RANGE,
    LAMBDA,
    MAX_AUTHORITY_WEIGHT,
    distrust_term,
    effective_sample_size,
    example_weights,
    normalize,
)

authority = st.floats(0, MAX_AUTHORITY_WEIGHT)
entropy = st.floats(0, 20)
alphas = st.floats(*ALPHA_RANGE)
lambdas = st.floats(0, 10)
sources = st.lists(st.tuples(authority, entropy), min_size=1, max_size=30)
weights_and_tokens = st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 100_000)), min_size=1, max_size=50)


def split(pairs):
    return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])


def test_the_published_numbers():
    # DESIGN §6: r² is 21 for the worst source and 1.7 for a better one.
    term = distrust_term([0.99, 0.90, 0.0], [0.0, 1.0, 5.0])
    assert term / ALPHA == pytest.approx([21.2076, 1.6967, 25.0], abs=1e-4)
    assert term == pytest.approx([57.2605, 4.5812, 67.5], abs=1e-4)
    assert term.dtype == np.float64


@given(authority, entropy, alphas, lambdas)
def test_each_formula_as_written(w, h, alpha, lambda_):
    r = math.log(1 - w + 1e-8) + h
    options = {"alpha": alpha, "lambda_": lambda_}
    monotone = example_weights([w], [h], weighting="monotone", **options)
    published = example_weights([w], [h], weighting="published", **options)
    assert monotone == pytest.approx([1 + lambda_ * alpha * max(r, 0) ** 2], rel=1e-12)
    assert published == pytest.approx([1 + lambda_ * alpha * r**2], rel=1e-12)
    assert published == pytest.approx(1 + lambda_ * distrust_term([w], [h], alpha=alpha), rel=1e-12)
    assert example_weights([w], [h], weighting="off", **options).tolist() == [1.0]


def test_the_defaults_are_those_of_the_design():
    assert (ALPHA, LAMBDA, ALPHA_RANGE, MAX_AUTHORITY_WEIGHT) == (2.7, 0.6, (2.3, 3.0), 0.99)
    assert example_weights([0.1], [3.0]) == pytest.approx(
        [1 + 0.6 * 2.7 * (math.log(0.9) + 3) ** 2], rel=1e-6
    )


@given(authority, authority, entropy, alphas, lambdas)
def test_more_authority_never_gains_weight(w1, w2, h, alpha, lambda_):
    low, high = sorted((w1, w2))
    of_low, of_high = example_weights([low, high], [h, h], alpha=alpha, lambda_=lambda_)
    assert of_high <= of_low * (1 + 1e-12)


@given(authority, entropy, entropy, alphas, lambdas)
def test_more_entropy_never_loses_weight(w, h1, h2, alpha, lambda_):
    low, high = sorted((h1, h2))
    of_low, of_high = example_weights([w, w], [low, high], alpha=alpha, lambda_=lambda_)
    assert of_low <= of_high * (1 + 1e-12)


def test_published_reverses_where_monotone_does_not():
    w, h = [0.99, 0.90], [0.0, 1.0]
    worst, better = example_weights(w, h, weighting="published")
    assert worst > 9 * better
    assert example_weights(w, h, weighting="monotone").tolist() == [1.0, 1.0]


@given(sources, st.floats(1, 100), st.sampled_from(["off", "published", "monotone"]))
def test_max_ratio_limits_only_large_weights(pairs, max_ratio, weighting):
    w, h = split(pairs)
    unlimited = example_weights(w, h, weighting=weighting)
    clipped = example_weights(w, h, weighting=weighting, max_ratio=max_ratio)
    bound = max_ratio * unlimited.min()
    assert clipped.max() <= bound
    assert np.array_equal(clipped[unlimited <= bound], unlimited[unlimited <= bound])


@given(weights_and_tokens)
def test_the_mean_over_tokens_is_one(pairs):
    weights, tokens = split(pairs)
    u = normalize(weights, tokens=tokens)
    assert math.fsum(u * tokens) / tokens.sum() == pytest.approx(1, rel=1e-12)
    assert u * (weights[0] / u[0]) == pytest.approx(weights, rel=1e-12)


@given(weights_and_tokens, st.randoms(use_true_random=False))
def test_normalization_does_not_depend_on_the_order_of_examples(pairs, random):
    shuffled = list(enumerate(pairs))
    random.shuffle(shuffled)
    u = normalize(split(pairs)[0], tokens=split(pairs)[1])
    positions, moved = zip(*shuffled, strict=True)
    of_moved = normalize(split(moved)[0], tokens=split(moved)[1])
    assert np.array_equal(of_moved, u[list(positions)])


@given(st.floats(1e-6, 1e300), st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_equal_weights_are_exactly_one(weight, tokens):
    assert normalize(np.full(len(tokens), weight), tokens=tokens).tolist() == [1.0] * len(tokens)


def test_huge_weights_do_not_overflow():
    assert normalize([1e308, 1e308, 5e307], tokens=[10, 10, 10]) == pytest.approx([1.2, 1.2, 0.6])
    assert effective_sample_size([1e308, 1e308]) == 2


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50))
def test_the_effective_sample_size_is_between_one_and_n(weights):
    size = effective_sample_size(weights)
    assert 1 - 1e-9 <= size <= len(weights) * (1 + 1e-9)
    assert size == pytest.approx(sum(weights) ** 2 / sum(u * u for u in weights), rel=1e-9)


def test_an_effective_sample_size_computed_by_hand():
    """(1 + 1 + 2)² / (1² + 1² + 2²)."""
    assert effective_sample_size([1, 1, 2]) == pytest.approx(16 / 6)


def test_the_effective_sample_size_at_its_limits():
    assert effective_sample_size(np.full(7, 0.3)) == 7
    assert effective_sample_size([1e9, 1, 1, 1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 2.2}, "alpha must be in"),
        ({"alpha": 3.1}, "alpha must be in"),
        ({"alpha": math.nan}, "alpha must be in"),
        ({"lambda_": -0.1}, "lambda must be"),
        ({"lambda_": math.inf}, "lambda must be"),
        ({"max_ratio": 0.5}, "max_ratio must be"),
        ({"max_ratio": math.nan}, "max_ratio must be"),
        ({"weighting": "linear"}, "off, published, monotone"),
    ],
)
def test_an_option_out_of_range_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        example_weights([0.5], [1.0], **options)


@pytest.mark.parametrize(
    ("w", "h", "words"),
    [
        ([0.5, 1.0], [1, 1], "authority_weight of example 1 is outside"),
        ([math.nan], [1], "authority_weight of example 0"),
        ([0.5], [-1], "provenance_entropy of example 0"),
        ([0.5], [math.inf], "provenance_entropy of example 0"),
        ([0.5, 0.5], [1], r"shapes \[2\] and \[1\]"),
        ([0.5], [1e200], "weight of example 0 overflows"),
    ],
)
def test_a_value_out_of_range_is_named(w, h, words):
    with pytest.raises(DataError, match=words):
        example_weights(w, h)


def test_alpha_is_checked_for_the_logged_term_too():
    with pytest.raises(ConfigError, match="alpha"):
        distrust_term([0.5], [1.0], alpha=1.0)


def test_weights_without_a_mean_are_refused():
    with pytest.raises(DataError, match="no example has a token"):
        normalize([1.0, 2.0], tokens=[0, 0])
    with pytest.raises(DataError, match="weight of example 1 is not a positive"):
        normalize([1.0, 0.0], tokens=[1, 1])
    with pytest.raises(DataError, match="b:2: its sum of token weights is not positive and finite: inf"):
        normalize([1.0, 1.0], tokens=[1, 1], token_weights=[1, math.inf], locations=["a:1", "b:2"])
    with pytest.raises(DataError, match="number of tokens of example 0"):
        normalize([1.0], tokens=[-1])
    with pytest.raises(DataError, match="one per example"):
        effective_sample_size([])


def test_the_inputs_are_not_modified():
    weights = np.array([1.0, 3.0])
    normalize(weights, tokens=[1, 1])
    effective_sample_size(weights)
    assert weights.tolist() == [1.0, 3.0]

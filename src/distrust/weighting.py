"""Example weights from the provenance of their sources: pure functions of numpy arrays.

Each example has the authority weight w of its source, dimensionless in [0, 0.99], and the entropy H of its
provenance in bits. A high authority weight means LESS training weight: 0 is a primary record, 0.99 is
coordinated consensus. With r = ln(1 − w + 1e-8) + H:

- The published term is α·r² (Brian Roemmele, "Empirical Distrust Term", 25 November 2025, public domain). It
  does not depend on the model: added to a loss it changes no gradient, so it is logged and never added. It
  adds nats to bits, as published.
- The example weight u multiplies the example's loss, and so its gradient. ``monotone`` takes
  u = 1 + λ·α·max(r, 0)²: u never grows with w and never falls with H. ``published`` takes u = 1 + λ·α·r²,
  which grows again for r < 0: w = 0.99, H = 0 has r² = 21.2, but w = 0.90, H = 1 has 1.7. ``off`` takes 1.

``normalize`` divides by the mean over the trained tokens, so that the learning rate keeps its meaning.
Results are float64. Sums are correctly rounded (``math.fsum``): they depend neither on the order of the
examples nor on how a numerical library splits a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.errors import ConfigError, DataError

Weighting = Literal["off", "published", "monotone"]  # how the example weight depends on r
ALPHA = 2.7  # default of α, the scale of the published term
ALPHA_RANGE = (2.3, 3.0)  # the range of α that was published, both ends included
LAMBDA = 0.6  # default of λ ≥ 0, the scale of the example weight relative to the published term
EPSILON = 1e-8  # added to 1 − w before the logarithm, as published
MAX_AUTHORITY_WEIGHT = 0.99  # towards 1 the logarithm falls to −18
_Floats = NDArray[np.float64]


def distrust_term(
    authority_weight: ArrayLike, provenance_entropy: ArrayLike, *, alpha: float = ALPHA
) -> NDArray[np.float64]:
    """The published term α·r² of each example, r = ln(1 − w + 1e-8) + H (Roemmele, 2025). For the log only.

    Args:
        authority_weight: w, shape [n], in [0, 0.99]; 0: primary record, 0.99: coordinated consensus.
        provenance_entropy: H, shape [n], in bits, finite and not negative.
        alpha: α, in ``ALPHA_RANGE``.

    Returns:
        float64[n].

    Raises:
        ConfigError: α is outside its range.
        DataError: the inputs differ in shape, or a value is outside its range.
    """
    _check_alpha(alpha)
    return alpha * _r(authority_weight, provenance_entropy) ** 2


def example_weights(
    authority_weight: ArrayLike,
    provenance_entropy: ArrayLike,
    *,
    weighting: Weighting = "monotone",
    alpha: float = ALPHA,
    lambda_: float = LAMBDA,
    max_ratio: float | None = None,
    locations: Sequence[object] | None = None,
) -> NDArray[np.float64]:
    """The weight u of each example, before normalization. A high ``authority_weight`` gives a low u.

    Args:
        authority_weight: w, shape [n], in [0, 0.99]; 0: primary record, 0.99: coordinated consensus.
        provenance_entropy: H, shape [n], in bits, finite and not negative.
        weighting: ``monotone`` (default) 1 + λ·α·max(r, 0)², ``published`` 1 + λ·α·r², ``off`` 1, with
            r = ln(1 − w + 1e-8) + H (Roemmele, 2025).
        alpha: α, in ``ALPHA_RANGE``.
        lambda_: λ, finite and not negative.
        max_ratio: limits each weight to this multiple of the smallest one; at least 1.
        locations: the location of each example, for messages.

    Returns:
        float64[n], each at least 1.

    Raises:
        ConfigError: an option is outside its range.
        DataError: the inputs differ in shape, a value is outside its range, or a weight overflows.
    """
    if weighting not in get_args(Weighting):
        raise ConfigError(f"weighting must be one of {', '.join(get_args(Weighting))}, not {weighting!r}")
    _check_alpha(alpha)
    if not (math.isfinite(lambda_) and lambda_ >= 0):
        raise ConfigError(f"lambda must be a finite number, 0 or more, not {lambda_}")
    if max_ratio is not None and not max_ratio >= 1:
        raise ConfigError(f"max_ratio must be 1 or more, not {max_ratio}")
    r = _r(authority_weight, provenance_entropy)  # checks the data, also for weighting "off"
    if weighting == "off":
        return np.ones_like(r)
    with np.errstate(over="ignore"):  # reported below, with the example
        u = 1 + lambda_ * alpha * (np.maximum(r, 0) if weighting == "monotone" else r) ** 2
    problem = "overflows; its provenance entropy or λ is far too large"
    _require(np.isfinite(u), u, "weight", problem, locations)
    return np.minimum(u, max_ratio * u.min()) if max_ratio is not None and u.size else u


def normalize(
    weights: ArrayLike,
    *,
    tokens: ArrayLike,
    token_weights: ArrayLike | None = None,
    locations: Sequence[object] | None = None,
) -> NDArray[np.float64]:
    """Divides the weights by their mean over the trained tokens, Σ(tokens·u) / Σ tokens.

    If tokens have weights of their own, it is their product with u whose mean becomes 1.

    Args:
        weights: u, shape [n], positive.
        tokens: how many tokens of each example are trained, after truncation and repetition; shape [n].
        token_weights: the sum of the weights of these tokens; shape [n]. Default: all weigh 1.
        locations: the location of each example, for messages.

    Returns:
        float64[n]. Equal weights give exactly 1.0, so that weighting without effect changes no bit.

    Raises:
        DataError: the inputs differ in shape, a weight is not positive, or there is no token.
    """
    u, n = _pair(weights, tokens, "weights", "tokens")
    _require(np.isfinite(u) & (u > 0), u, "weight", "is not a positive number")
    _require(np.isfinite(n) & (n >= 0), n, "number of tokens", "is not a count")
    total = math.fsum(n)
    if total == 0:
        raise DataError("the weights have no mean: no example has a token to train on")
    sums = n if token_weights is None else _pair(u, token_weights, "weights", "token weights")[1]
    valid = np.isfinite(sums) & ((sums > 0) | (n == 0))
    _require(valid, sums, "sum of token weights", "is not positive and finite", locations)
    if (u == u[0]).all() and (sums == n).all():  # the mean may be rounded
        return np.ones_like(u)
    u /= u.max()  # neither the sum nor a product can overflow
    return u / (math.fsum(u * sums) / total)


def effective_sample_size(weights: ArrayLike) -> float:
    """Kish's effective sample size (Σu)² / Σu² (Kish, Survey Sampling, 1965).

    Args:
        weights: u, shape [n], positive; their scale does not matter.

    Returns:
        Between 1 (one example has all the weight) and n (all weights are equal).

    Raises:
        DataError: there is no weight, or one is not positive.
    """
    u = np.asarray(weights, np.float64)
    if u.ndim != 1 or not u.size:
        raise DataError(f"weights must be one per example, not of shape {list(u.shape)}")
    _require(np.isfinite(u) & (u > 0), u, "weight", "is not a positive number")
    u = u / u.max()  # squares neither overflow nor underflow to 0
    return math.fsum(u) ** 2 / math.fsum(u * u)


def _r(authority_weight: ArrayLike, provenance_entropy: ArrayLike) -> _Floats:
    """The published r = ln(1 − w + 1e-8) + H, float64[n]."""
    w, h = _pair(authority_weight, provenance_entropy, "authority_weight", "provenance_entropy")
    in_range = (w >= 0) & (w <= MAX_AUTHORITY_WEIGHT)  # false for NaN
    _require(in_range, w, "authority_weight", f"is outside [0, {MAX_AUTHORITY_WEIGHT}]")
    _require(np.isfinite(h) & (h >= 0), h, "provenance_entropy", "is not a finite number of bits ≥ 0")
    return np.log(1 - w + EPSILON) + h


def _pair(first: ArrayLike, second: ArrayLike, first_name: str, second_name: str) -> tuple[_Floats, _Floats]:
    a, b = np.array(first, np.float64), np.array(second, np.float64)  # copies: normalize writes to one
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(
            f"{first_name} and {second_name} must be one number per example: "
            f"shapes {list(a.shape)} and {list(b.shape)}"
        )
    return a, b


def _require(
    valid: NDArray[np.bool_], values: _Floats, name: str, problem: str, locations: Sequence[Any] | None = None
) -> None:
    """Raise DataError for the first example that is not valid."""
    if not valid.all():
        first = int(np.argmin(valid))
        subject = f"{name} of example {first}" if locations is None else f"{locations[first]}: its {name}"
        raise DataError(f"{subject} {problem}: {float(values[first])}")


def _check_alpha(alpha: float) -> None:
    low, high = ALPHA_RANGE
    if not low <= alpha <= high:
        raise ConfigError(f"alpha must be in [{low}, {high}], not {alpha}")

"""What an example is worth by the provenance of its source: pure functions of numpy arrays.

An example comes with the authority weight w of its source, in [0, 0.99] without a unit, and the entropy H
of its provenance, in bits. With r = ln(1 − w + 1e-8) + H:

- the published term, α·r², is a number of the example alone. Added to a loss it changes no gradient, so it
  is logged and never added. It adds nats to bits, as it was published;
- the example weight multiplies the example's loss, and so its gradient. ``monotone`` takes
  u = 1 + λ·α·max(r, 0)²: more authority never gains weight and more entropy never loses it. ``published``
  takes u = 1 + λ·α·r², which grows again for r < 0: w = 0.99, H = 0 has r² = 21.2, and w = 0.90, H = 1 has
  1.7. ``off`` takes u = 1.

``normalize`` divides by the mean over the training tokens, so that the learning rate keeps its meaning.
Every result is float64. Sums are correctly rounded (``math.fsum``): they depend neither on the order of
the examples nor on how a numerical library splits a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.errors import ConfigError, DataError

__all__ = [
    "ALPHA",
    "ALPHA_RANGE",
    "EPSILON",
    "LAMBDA",
    "MAX_AUTHORITY_WEIGHT",
    "Weighting",
    "distrust_term",
    "effective_sample_size",
    "example_weights",
    "normalize",
]

Weighting = Literal["off", "published", "monotone"]
"""How the example weight follows from r; ``monotone`` is the default of the trainer."""

ALPHA = 2.7
"""Default of α, the scale of the published term."""

ALPHA_RANGE = (2.3, 3.0)
"""The values of α that are allowed, both ends included."""

LAMBDA = 0.6
"""Default of λ ≥ 0, the scale of the example weight over the published term."""

EPSILON = 1e-8
"""Added to 1 − w before the logarithm, as published."""

MAX_AUTHORITY_WEIGHT = 0.99
"""The largest authority weight: towards 1 the logarithm runs off to −18."""


def distrust_term(
    authority_weight: ArrayLike, provenance_entropy: ArrayLike, *, alpha: float = ALPHA
) -> NDArray[np.float64]:
    """The published term of each example, α·r² with r = ln(1 − w + 1e-8) + H. For the log only.

    Args:
        authority_weight: w, shape [n], in [0, 0.99].
        provenance_entropy: H, shape [n], in bits, finite and not negative.
        alpha: α, within ``ALPHA_RANGE``.

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
    """The weight u of each example, before it is normalized.

    Args:
        authority_weight: w, shape [n], in [0, 0.99].
        provenance_entropy: H, shape [n], in bits, finite and not negative.
        weighting: ``monotone`` 1 + λ·α·max(r, 0)², ``published`` 1 + λ·α·r², ``off`` 1.
        alpha: α, within ``ALPHA_RANGE``.
        lambda_: λ, finite and not negative.
        max_ratio: if given, no weight exceeds this many times the smallest one; at least 1.
        locations: where each example stands, for messages.

    Returns:
        float64[n], each at least 1.

    Raises:
        ConfigError: an option is outside its range.
        DataError: the inputs differ in shape, a value is outside its range, or a weight overflows.
    """
    _check_options(weighting=weighting, alpha=alpha, lambda_=lambda_, max_ratio=max_ratio)
    r = _r(authority_weight, provenance_entropy)
    if weighting == "off":
        return np.ones_like(r)
    with np.errstate(over="ignore"):  # reported below, with the example
        u = 1 + lambda_ * alpha * (np.maximum(r, 0) if weighting == "monotone" else r) ** 2
    what = "overflows; its provenance entropy or λ is far too large"
    _require(np.isfinite(u), u, "weight", what, locations)
    return np.minimum(u, max_ratio * u.min()) if max_ratio is not None and u.size else u


def normalize(weights: ArrayLike, *, tokens: ArrayLike) -> NDArray[np.float64]:
    """Divides the weights by their mean over the training tokens, Σ(tokens·u) / Σ tokens.

    Args:
        weights: u, shape [n], positive.
        tokens: the number of trained tokens of each example as they are sampled, after truncation;
            shape [n].

    Returns:
        float64[n]. Equal weights give exactly 1.0, so that weighting which does nothing changes no bit.

    Raises:
        DataError: the inputs differ in shape, a weight is not positive, or there is no token.
    """
    u, n = _pair(weights, tokens, "weights", "tokens")
    _require(np.isfinite(u) & (u > 0), u, "weight", "is not a positive number")
    _require(np.isfinite(n) & (n >= 0), n, "number of tokens", "is not a count")
    total = math.fsum(n)
    if total == 0:
        raise DataError("the weights have no mean: no example has a token to train on")
    if (u == u[0]).all():  # rounding of the mean must not show
        return np.ones_like(u)
    u /= u.max()  # neither sum nor product can overflow
    return u / (math.fsum(u * n) / total)


def effective_sample_size(weights: ArrayLike) -> float:
    """How many equally weighted examples the weighted ones are worth: (Σu)² / Σu² (Kish, 1965).

    Args:
        weights: u, shape [n], positive; their scale does not matter.

    Returns:
        Between 1 (one example has all the weight) and n (all are equal).

    Raises:
        DataError: there is no weight, or one is not positive.
    """
    u = np.asarray(weights, np.float64)
    if u.ndim != 1 or not u.size:
        raise DataError(f"weights must be one per example, not of shape {list(u.shape)}")
    _require(np.isfinite(u) & (u > 0), u, "weight", "is not a positive number")
    u = u / u.max()  # squares neither overflow nor vanish
    return math.fsum(u) ** 2 / math.fsum(u * u)


def _r(authority_weight: ArrayLike, provenance_entropy: ArrayLike) -> NDArray[np.float64]:
    """The distrust r = ln(1 − w + 1e-8) + H, float64[n]."""
    w, h = _pair(authority_weight, provenance_entropy, "authority_weight", "provenance_entropy")
    _require(
        (w >= 0) & (w <= MAX_AUTHORITY_WEIGHT),
        w,
        "authority_weight",
        f"is outside [0, {MAX_AUTHORITY_WEIGHT}]",
    )
    _require(np.isfinite(h) & (h >= 0), h, "provenance_entropy", "is not a finite number of bits ≥ 0")
    return np.log(1 - w + EPSILON) + h


def _pair(
    first: ArrayLike, second: ArrayLike, first_name: str, second_name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.array(first, np.float64), np.array(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(
            f"{first_name} and {second_name} must be one number per example: "
            f"shapes {list(a.shape)} and {list(b.shape)}"
        )
    return a, b


def _require(
    good: NDArray[np.bool_],
    values: NDArray[np.float64],
    name: str,
    what: str,
    locations: Sequence[object] | None = None,
) -> None:
    if not good.all():
        first = int(np.argmin(good))
        whose = f"{name} of example {first}" if locations is None else f"{locations[first]}: its {name}"
        raise DataError(f"{whose} {what}: {float(values[first])}")


def _check_alpha(alpha: float) -> None:
    low, high = ALPHA_RANGE
    if not low <= alpha <= high:
        raise ConfigError(f"alpha must be in [{low}, {high}], not {alpha}")


def _check_options(*, weighting: str, alpha: float, lambda_: float, max_ratio: float | None) -> None:
    if weighting not in get_args(Weighting):
        raise ConfigError(f"weighting must be one of {', '.join(get_args(Weighting))}, not {weighting!r}")
    _check_alpha(alpha)
    if not (math.isfinite(lambda_) and lambda_ >= 0):
        raise ConfigError(f"lambda must be a finite number, 0 or more, not {lambda_}")
    if max_ratio is not None and not max_ratio >= 1:
        raise ConfigError(f"max_ratio must be 1 or more, not {max_ratio}")

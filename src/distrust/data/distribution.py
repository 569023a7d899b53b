"""How the weights of a data set are distributed: what a user is shown of them, and what a run keeps of them.

Pure functions of arrays, without a loop over examples: a corpus has millions of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.data.corpus import OTHER_CLASSES
from distrust.data.records import Location
from distrust.errors import DataError

BINS = 24
"""Of the histogram of the weights, each as many times as wide as the one before."""

CLASSES = 20
"""How many source classes are told apart; what the smaller ones weigh is summed up."""


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """What the examples of one source class weigh.

    Attributes:
        name: of the class; empty for examples that name none.
        examples: how many there are.
        tokens: how many learned tokens they have.
        authority_weight: their mean w.
        provenance_entropy: their mean H, in bits.
        weight: their mean weight u.
        share: their part of the sum of tokens · u, in [0, 1].
    """

    name: str
    examples: int
    tokens: int
    authority_weight: float
    provenance_entropy: float
    weight: float
    share: float


@dataclass(frozen=True, slots=True)
class Extreme:
    """One of the heaviest or lightest examples.

    Attributes:
        where: file and line.
        authority_weight: w.
        provenance_entropy: H, in bits.
        weight: u.
    """

    where: str
    authority_weight: float
    provenance_entropy: float
    weight: float


Quartiles = tuple[float, float, float, float, float]
"""Smallest, lower quartile, median, upper quartile, largest."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The weights of a data set at a glance.

    Attributes:
        examples: how many there are.
        tokens: how many learned tokens they have.
        effective_examples: how many equally weighted examples they are worth.
        quantiles: of ``authority_weight``, ``provenance_entropy`` and ``weight``.
        edges: of the histogram of the weights, one more than counts; each edge is the one before times
            the same factor.
        counts: the examples between two edges. One bin where all weights are equal.
        classes: by falling share; what comes after the twentieth is summed up as ``(others)``.
        heaviest: by falling weight; of equal ones the first of the corpus.
        lightest: by rising weight, likewise.
    """

    examples: int
    tokens: int
    effective_examples: float
    quantiles: Mapping[str, Quartiles]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    classes: tuple[ClassSummary, ...]
    heaviest: tuple[Extreme, ...]
    lightest: tuple[Extreme, ...]

    def as_json(self) -> dict[str, Any]:
        """Objects, lists, strings and finite numbers, under the names of the attributes."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def summarize_weights(
    *,
    authority_weight: ArrayLike,
    provenance_entropy: ArrayLike,
    weights: ArrayLike,
    tokens: ArrayLike,
    classes: Sequence[str],
    class_of: ArrayLike,
    locations: Sequence[Location | str],
    effective_examples: float,
    extremes: int = 5,
) -> Distribution:
    """Sums up what examples weigh.

    Args:
        authority_weight: w, shape [n], n at least 1.
        provenance_entropy: H in bits, shape [n].
        weights: u, shape [n], positive; their scale is the caller's choice.
        tokens: the learned tokens of each example, shape [n]; ones where they are not known.
        classes: the names of the source classes.
        class_of: the class of each example, an index into ``classes``, shape [n].
        locations: where each example stands; only those of the extremes are asked for.
        effective_examples: what ``weighting.effective_sample_size`` says.
        extremes: how many of the heaviest, and of the lightest.

    Raises:
        DataError: there is no example, or a weight is not a positive number.
    """
    w, h, u = (np.asarray(values, np.float64) for values in (authority_weight, provenance_entropy, weights))
    n = np.asarray(tokens, np.int64)
    if not u.size:
        raise DataError("there is no example: no distribution of weights")
    if not (np.isfinite(u) & (u > 0)).all():
        raise DataError("a weight is not a positive number")
    edges, counts = _histogram(u)

    def extreme(examples: NDArray[np.int64]) -> tuple[Extreme, ...]:
        return tuple(
            Extreme(str(locations[i]), float(w[i]), float(h[i]), float(u[i])) for i in examples.tolist()
        )

    return Distribution(
        examples=len(u),
        tokens=int(n.sum()),
        effective_examples=float(effective_examples),
        quantiles={
            "authority_weight": _quartiles(w),
            "provenance_entropy": _quartiles(h),
            "weight": _quartiles(u),
        },
        edges=edges,
        counts=counts,
        classes=_summaries(w, h, u, n, classes, np.asarray(class_of, np.int64)),
        heaviest=extreme(_smallest(-u, extremes)),
        lightest=extreme(_smallest(u, extremes)),
    )


def _quartiles(values: NDArray[np.float64]) -> Quartiles:
    low, lower, median, upper, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return low, lower, median, upper, high


def _histogram(u: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    low, high = float(u.min()), float(u.max())
    edges = np.geomspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high  # rounding must not lose the smallest or the largest
    if not (np.diff(edges) > 0).all():  # all equal, but for the last digits: a bin that can be drawn
        edges = np.array([low / 1.1, high * 1.1])
    counts, _ = np.histogram(u, edges)
    return tuple(edges.tolist()), tuple(counts.tolist())


def _smallest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The indices of the smallest values by size, of equal ones the first; without sorting all of them."""
    count = min(count, len(values))
    if count < 1:
        return np.empty(0, np.int64)
    bound = np.partition(values, count - 1)[count - 1]
    under = np.flatnonzero(values < bound)
    equal = np.flatnonzero(values == bound)[: count - len(under)]
    return np.concatenate([under[np.argsort(values[under], kind="stable")], equal])


def _summaries(
    w: NDArray[np.float64],
    h: NDArray[np.float64],
    u: NDArray[np.float64],
    n: NDArray[np.int64],
    classes: Sequence[str],
    class_of: NDArray[np.int64],
) -> tuple[ClassSummary, ...]:
    """One row of sums a class, and of those a summary each."""
    columns = (np.ones_like(u), n, w, h, u, n * u)
    sums = np.stack([np.bincount(class_of, column, minlength=len(classes)) for column in columns], axis=1)
    order = np.argsort(-sums[:, 5], kind="stable")
    present = [i for i in order.tolist() if sums[i, 0] > 0]
    named = [i for i in present if classes[i] != OTHER_CLASSES][:CLASSES]  # those are summed up already
    rows = [(classes[i], sums[i]) for i in named]
    if len(named) < len(present):
        rows.append((OTHER_CLASSES, sums[[i for i in present if i not in named]].sum(axis=0)))
    total = float(sums[:, 5].sum()) or 1.0  # no token: no share
    return tuple(_summary(name, row.tolist(), total) for name, row in rows)


def _summary(name: str, sums: list[float], total: float) -> ClassSummary:
    examples, tokens, w, h, u, weighted = sums
    return ClassSummary(
        name, int(examples), int(tokens), w / examples, h / examples, u / examples, weighted / total
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

"""Summarizes the weights of a dataset, for display and for a run's log.

Pure functions of arrays, without a loop over examples: a corpus has millions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrust.data.corpus import OTHER_CLASSES
from distrust.data.records import Location
from distrust.errors import DataError

BINS = 24  # bins of the histogram of the weights, equally wide on a logarithmic scale
CLASSES = 20  # the largest number of source classes in a summary; smaller ones are added up


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """The examples of one source class."""

    name: str  # "" for examples that name no class
    examples: int
    tokens: int  # trained tokens
    authority_weight: float  # mean w
    provenance_entropy: float  # mean H, bits
    weight: float  # mean u
    share: float  # of the sum of tokens · u, in [0, 1]


@dataclass(frozen=True, slots=True)
class Extreme:
    """One of the heaviest or lightest examples."""

    where: str  # file and line
    authority_weight: float  # w
    provenance_entropy: float  # H, bits
    weight: float  # u


# Minimum, lower quartile, median, upper quartile, maximum.
Quartiles = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Summary of the weights of a dataset."""

    examples: int
    tokens: int  # trained tokens
    effective_examples: float  # effective sample size
    quantiles: Mapping[str, Quartiles]  # of authority_weight, provenance_entropy and weight
    edges: tuple[float, ...]  # of the histogram's bins, geometrically spaced; one more than ``counts``
    counts: tuple[int, ...]  # examples in each bin; a single bin if all weights are equal
    classes: tuple[ClassSummary, ...]  # by falling share; after CLASSES, one ``(others)``
    heaviest: tuple[Extreme, ...]  # by falling weight; of equal ones the first of the corpus
    lightest: tuple[Extreme, ...]  # by rising weight, likewise

    def as_json(self) -> dict[str, Any]:
        """The attributes as objects, lists, strings and finite numbers."""
        return dict(json.loads(json.dumps(asdict(self))))  # tuples become lists


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
    """Summarizes the weights of n examples.

    Args:
        authority_weight: w, shape [n], n at least 1.
        provenance_entropy: H in bits, shape [n].
        weights: u, shape [n], positive; their scale is the caller's choice.
        tokens: the trained tokens of each example, shape [n]; ones if unknown.
        classes: the names of the source classes.
        class_of: the class of each example, an index into ``classes``, shape [n].
        locations: the location of each example; only those of the extremes are read.
        effective_examples: the result of ``weighting.effective_sample_size``.
        extremes: how many of the heaviest, and of the lightest.

    Raises:
        DataError: there is no example, or a weight is not a positive number.
    """
    w, h, u = (np.asarray(values, np.float64) for values in (authority_weight, provenance_entropy, weights))
    n = np.asarray(tokens, np.int64)
    if not u.size:
        raise DataError("there are no examples, so no distribution of weights")
    if not (np.isfinite(u) & (u > 0)).all():
        raise DataError("a weight is not a positive number")
    edges, counts = _histogram(u)
    columns = {"authority_weight": w, "provenance_entropy": h, "weight": u}

    def extreme(examples: NDArray[np.int64]) -> tuple[Extreme, ...]:
        rows = ((i, *(float(column[i]) for column in (w, h, u))) for i in examples.tolist())
        return tuple(Extreme(str(locations[i]), *numbers) for i, *numbers in rows)

    return Distribution(
        examples=len(u),
        tokens=int(n.sum()),
        effective_examples=float(effective_examples),
        quantiles={name: _quartiles(values) for name, values in columns.items()},
        edges=edges,
        counts=counts,
        classes=_summaries((np.ones_like(u), n, w, h, u, n * u), classes, np.asarray(class_of, np.int64)),
        heaviest=extreme(_smallest(-u, extremes)),
        lightest=extreme(_smallest(u, extremes)),
    )


def _quartiles(values: NDArray[np.float64]) -> Quartiles:
    low, lower, median, upper, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return low, lower, median, upper, high


def _histogram(u: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    low, high = float(u.min()), float(u.max())
    edges = np.geomspace(low, high, BINS + 1)  # float64[BINS + 1]
    edges[0], edges[-1] = low, high  # rounding must not lose the smallest or the largest
    if not (np.diff(edges) > 0).all():  # all weights equal up to rounding: one bin of visible width
        edges = np.array([low / 1.1, high * 1.1])
    counts, _ = np.histogram(u, edges)
    return tuple(edges.tolist()), tuple(counts.tolist())


def _smallest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The indices of the smallest values in order, ties by index; without sorting all values."""
    count = min(count, len(values))
    if count < 1:
        return np.empty(0, np.int64)
    bound = np.partition(values, count - 1)[count - 1]  # linear time
    smaller = np.flatnonzero(values < bound)
    equal = np.flatnonzero(values == bound)[: count - len(smaller)]
    return np.concatenate([smaller[np.argsort(values[smaller], kind="stable")], equal])


def _summaries(
    columns: Sequence[NDArray[Any]], classes: Sequence[str], class_of: NDArray[np.int64]
) -> tuple[ClassSummary, ...]:
    """Summarize each class; the columns are 1, tokens, w, H, u and tokens · u of each example."""
    # float64[classes, 6]: the sums over each class.
    sums = np.stack([np.bincount(class_of, column, minlength=len(classes)) for column in columns], axis=1)
    by_share = np.argsort(-sums[:, 5], kind="stable")
    present = [i for i in by_share.tolist() if sums[i, 0] > 0]
    # A corpus with many classes has OTHER_CLASSES already: it belongs to the last row, not among the named.
    named = [i for i in present if classes[i] != OTHER_CLASSES][:CLASSES]
    rows = [(classes[i], sums[i]) for i in named]
    if len(named) < len(present):
        rows.append((OTHER_CLASSES, sums[[i for i in present if i not in named]].sum(axis=0)))
    total = float(sums[:, 5].sum()) or 1.0  # without tokens, all shares are 0
    return tuple(_summary(name, row.tolist(), total) for name, row in rows)


def _summary(name: str, sums: list[float], total: float) -> ClassSummary:
    examples, tokens, w, h, u, weighted = sums
    return ClassSummary(
        name, int(examples), int(tokens), w / examples, h / examples, u / examples, weighted / total
    )

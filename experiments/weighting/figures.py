"""Results -> figures: the metrics of each run, and means with intervals over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.weighting.design import BLIND
from experiments.weighting.results import Result

#: Student's t for a two-sided interval of 95%, by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BINS = 10

Measure = Callable[[Result], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the seeds, and half of its 95% interval: nan for one seed."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """By Student's t: the values are assumed to be normally distributed."""
        if len(values) < 2:
            return cls(statistics.fmean(values), math.nan, len(values))
        freedom = min(len(values) - 1, len(STUDENT))  # for more seeds than the table has: wider, not narrower
        half = STUDENT[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), half, len(values))


def primary_share(result: Result) -> float:
    """Share of the disputed facts whose primary value is more probable."""
    return _share_above_zero(result["disputed"])


def sole_kept(result: Result) -> float:
    """Share of the sole-source facts whose stated value is more probable than the foil."""
    return _share_above_zero(result["sole"])


def primary_probability(result: Result) -> float:
    return statistics.fmean(fact[1] for fact in result["disputed"])


def coordinated_probability(result: Result) -> float:
    return statistics.fmean(fact[2] for fact in result["disputed"])


def brier(result: Result) -> float:
    """Mean of (q - 1)², where q is the share of the primary value in the probability of the two."""
    return statistics.fmean((q - 1) ** 2 for q in _shares([result]))


def neutral_loss(result: Result) -> float:
    return float(result["neutral_loss"])


def calibration_error(results: Iterable[Result]) -> float:
    """ECE: the facts of all seeds by the model's confidence, max(q, 1 - q), in ten bins from 0 to 1.

    The mean of |confidence - accuracy| over the bins, weighted by their facts. Correct is the primary value.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    shares = _shares(results)
    for q in shares:
        sure = max(q, 1 - q)
        bins[min(int(sure * BINS), BINS - 1)].append((sure, q > 0.5))
    return sum(abs(sum(sure for sure, _ in one) - sum(right for _, right in one)) for one in bins) / len(
        shares
    )


def of_cell(results: Sequence[Result], world: str, wrong: float, method: str) -> list[Result]:
    """The results of a cell, by seed. Methods that use no labels share those of correct labels."""
    wrong = 0.0 if method in BLIND else wrong
    matching = [
        one for one in results if (one["world"], one["wrong"], one["method"]) == (world, wrong, method)
    ]
    return sorted(matching, key=lambda result: int(result["seed"]))


def estimate(results: Sequence[Result], measure: Measure) -> Estimate | None:
    """Over the seeds; None if there are none."""
    return Estimate.of([measure(result) for result in results]) if results else None


def difference(ours: Sequence[Result], theirs: Sequence[Result], measure: Measure) -> Estimate | None:
    """Within the same seeds: both saw the same world in the same order."""
    by_seed = {result["seed"]: measure(result) for result in theirs}
    pairs = [measure(result) - by_seed[result["seed"]] for result in ours if result["seed"] in by_seed]
    return Estimate.of(pairs) if pairs else None


def _share_above_zero(facts: Sequence[Sequence[float]]) -> float:
    return sum(fact[0] > 0 for fact in facts) / len(facts)


def _shares(results: Iterable[Result]) -> list[float]:
    """For each disputed fact q = p(primary) / (p(primary) + p(coordinated)), p by mean log-probability."""
    return [1 / (1 + math.exp(-fact[0])) for result in results for fact in result["disputed"]]

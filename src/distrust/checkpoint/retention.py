"""The retention rules: which checkpoints to keep, as a pure function of steps, metrics and rules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from distrust.errors import ConfigError

MetricMode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Retention:
    """The rules. A checkpoint that any rule keeps is kept; so are finals and the newest one."""

    keep_last: int | None = 3  #: number of newest checkpoints; None keeps all
    keep_best: int = 1  #: number of best checkpoints by ``metric``, among those that have it
    keep_every: int | None = None  #: keep steps that are a multiple of it; None for no such rule
    metric: str = "eval_loss"
    metric_mode: MetricMode = "min"  #: whether a lower or a higher value is better

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:  # 0 would remove the newest checkpoint
            raise ConfigError(f"keep_last is {self.keep_last}; keep at least 1, or None for all")
        if self.keep_best < 0:
            raise ConfigError(f"keep_best is {self.keep_best}; give 0 or more")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"keep_every is {self.keep_every}; give 1 or more, or None")
        if self.metric_mode not in ("min", "max"):
            raise ConfigError(f"metric_mode is {self.metric_mode!r}; give 'min' or 'max'")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A step as the rules see it."""

    step: int
    final: bool
    metrics: Mapping[str, float]
    measured_on: str = ""  #: identifies the data on which they were measured; empty if unknown


def last_steps(candidates: Iterable[Candidate], rules: Retention) -> set[int]:
    """The newest ``keep_last`` steps; always at least the newest one."""
    steps = sorted(candidate.step for candidate in candidates)  # steps may be saved in any order
    return set(steps if rules.keep_last is None else steps[-rules.keep_last :])


def rank_by_metric(candidates: Iterable[Candidate], rules: Retention) -> list[int]:
    """The steps that have the metric, best first; of equal ones the earlier first.

    Values measured on other data than the newest one cannot be compared with it, and are left out.
    """
    measured = [candidate for candidate in candidates if rules.metric in candidate.metrics]
    measured_on = max(measured, key=lambda candidate: candidate.step).measured_on if measured else ""
    sign = 1 if rules.metric_mode == "min" else -1  # so that the smallest value is the best
    values = [
        (sign * value, candidate.step)
        for candidate in measured
        # Not math.isnan: metadata may contain integers that are too large for a float.
        if candidate.measured_on == measured_on and (value := candidate.metrics[rules.metric]) == value
    ]
    return [step for _, step in sorted(values)]  # ties: the smaller step


def steps_that_displace(candidates: Collection[Candidate], rules: Retention) -> set[int]:
    """The steps that count towards a rule of N, so that others are removed: they must be intact."""
    return last_steps(candidates, rules) | set(rank_by_metric(candidates, rules)[: rules.keep_best])


def steps_to_keep(candidates: Collection[Candidate], rules: Retention) -> set[int]:
    """The steps that any rule keeps."""
    finals = {candidate.step for candidate in candidates if candidate.final}  # never removed by a rule
    every = rules.keep_every
    multiples = {candidate.step for candidate in candidates if every and candidate.step % every == 0}
    return steps_that_displace(candidates, rules) | finals | multiples

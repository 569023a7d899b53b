"""What the evaluations of a run have come to: a pure function of their sequence.

It is saved with each checkpoint, so that a run that was interrupted stops early where the undisturbed one
does. It is no part of the state's digest: evaluating changes nothing of what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distrust.checkpoint.retention import MetricMode


@dataclass(frozen=True, slots=True)
class BestTracker:
    """The last evaluation, the best one, and how many there were since.

    Attributes:
        metric: what the best one is told by.
        mode: whether a lower or a higher value is better.
        loss: eval loss of the last one.
        best: value of the metric at the best one.
        best_step: optimizer steps made by then.
        unimproved: evaluations since the best one.
        measured_on: the fingerprint of what is evaluated on; empty where that is not known.
    """

    metric: str = "eval_loss"
    mode: MetricMode = "min"
    loss: float | None = None
    best: float | None = None
    best_step: int = 0
    unimproved: int = 0
    measured_on: str = ""

    def update(self, metrics: Mapping[str, float], *, step: int) -> BestTracker:
        """With one more, by the metrics of its step; one that was not measured there counts for nothing."""
        evaluated = replace(self, loss=metrics.get("eval_loss"))
        value = metrics.get(self.metric)
        if value is None:
            return evaluated
        if self._improves(value):
            return replace(evaluated, best=value, best_step=step, unimproved=0)
        return replace(evaluated, unimproved=self.unimproved + 1)

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether as many as that have not improved on the best one."""
        return patience is not None and self.unimproved >= patience

    def restore(self, saved: Mapping[str, Any] | None) -> BestTracker:
        """Those that a checkpoint holds; none of them, if they cannot be compared with those to come."""
        if saved is None or (saved["metric"], saved["mode"]) != (self.metric, self.mode):
            return self
        if self.used_other_data(saved):
            return self
        return replace(BestTracker(**saved), measured_on=self.measured_on)

    def used_other_data(self, saved: Mapping[str, Any] | None) -> bool:
        """Whether those that a checkpoint holds were measured on other data."""
        there = (saved or {}).get("measured_on")
        return bool(there and self.measured_on) and there != self.measured_on

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        if math.isnan(value) or math.isnan(self.best):
            return not math.isnan(value)
        return value < self.best if self.mode == "min" else value > self.best

"""Best evaluation and early stopping: a pure function of the sequence of evaluations.

It is saved with each checkpoint, so an interrupted run stops early at the same step as an uninterrupted one.
It is not part of the state digest, because evaluating changes nothing that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distrust.checkpoint.retention import MetricMode


@dataclass(frozen=True, slots=True)
class BestTracker:
    """The last evaluation, the best one, and the number of evaluations since."""

    metric: str = "eval_loss"  # decides which evaluation is the best
    mode: MetricMode = "min"  # whether a lower or a higher value is better
    loss: float | None = None  # eval loss of the last evaluation
    best: float | None = None  # value of the metric at the best evaluation
    best_step: int = 0  # optimizer steps made at the best evaluation
    unimproved: int = 0  # evaluations since the best one
    measured_on: str = ""  # fingerprint of the evaluation data; empty if not known

    def update(self, metrics: Mapping[str, float], *, step: int) -> BestTracker:
        """Add an evaluation; one without the metric changes neither the best nor the count."""
        evaluated = replace(self, loss=metrics.get("eval_loss"))
        value = metrics.get(self.metric)
        if value is None:
            return evaluated
        if self._improves(value):
            return replace(evaluated, best=value, best_step=step, unimproved=0)
        return replace(evaluated, unimproved=self.unimproved + 1)

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last ``patience`` evaluations did not improve on the best one."""
        return patience is not None and self.unimproved >= patience

    def restore(self, saved: Mapping[str, Any] | None) -> BestTracker:
        """The saved tracker, or this empty one if later evaluations cannot be compared with it."""
        if saved is None or (saved["metric"], saved["mode"]) != (self.metric, self.mode):
            return self
        if self.used_other_data(saved):
            return self
        return replace(BestTracker(**saved), measured_on=self.measured_on)

    def used_other_data(self, saved: Mapping[str, Any] | None) -> bool:
        """Whether the saved evaluations were made on other data."""
        saved_data = (saved or {}).get("measured_on")
        return bool(saved_data and self.measured_on) and saved_data != self.measured_on

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        if math.isnan(value) or math.isnan(self.best):
            return not math.isnan(value)  # NaN is worse than any number
        return value < self.best if self.mode == "min" else value > self.best

"""How far a run is: the counters of the loop, its best evaluation, and the state that any thread may read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distrust.checkpoint.retention import MetricMode
from distrust.option_values import STEP_METRICS
from distrust.run_record import RunRecord
from distrust.training.events import StepEnded


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    metric: str  # name of the metric
    value: float  # the lowest or highest value, depending on metric_mode
    step: int  # number of the optimizer step that it followed


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is: an immutable value, so any thread may read it."""

    out: Path  # the folder of the run
    running: bool = False  # whether the run is in progress
    step: int = 0  # completed optimizer steps, over all sessions
    max_steps: int | None = None  # optimizer steps of the whole run; None until known
    epoch_steps: float | None = None  # optimizer steps of one pass over the data; None until known
    tokens_seen: int = 0  # trained tokens of all steps so far
    elapsed_seconds: float = 0.0  # time spent in steps, over all sessions
    learning_rate: float | None = None  # learning rate of the last step
    #: By name: those of the last step and of an evaluation after it, and always the latest ``eval_loss``.
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None  # the best evaluation
    checkpoint: Path | None = None  # path of the newest durable checkpoint

    @property
    def epoch(self) -> float | None:
        """Passes over the data, as a fraction."""
        return None if self.epoch_steps is None else self.step / self.epoch_steps


@dataclass(frozen=True, slots=True)
class BestTracker:
    """The last evaluation, the best one, and the number of evaluations since.

    A pure function of the sequence of evaluations. It is saved with each checkpoint, so an interrupted run
    stops early at the same step. It is not hashed into the state digest: evaluating changes no trained state.
    """

    metric: str = "eval_loss"  # decides which evaluation is the best
    mode: MetricMode = "min"  # whether a lower or a higher value is better
    loss: float | None = None  # eval loss of the last evaluation
    best: float | None = None  # value of the metric at the best evaluation
    best_step: int = 0  # completed optimizer steps at the best evaluation
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
        better = value < self.best if self.mode == "min" else value > self.best
        return better or (math.isnan(self.best) and not math.isnan(value))  # NaN is worse than any number


@dataclass(slots=True)
class Progress:
    """Counters and history of a run, updated after each step."""

    step: int = 0  # completed optimizer steps
    max_steps: int | None = None  # optimizer steps of the whole run; None until known
    epoch_steps: float | None = None  # optimizer steps of one pass over the data; None until known
    tokens_seen: int = 0  # trained tokens of all steps so far
    elapsed_seconds: float = 0.0  # time spent in steps, over all sessions
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step, and of an evaluation after it
    evaluations: BestTracker = field(default_factory=BestTracker)
    step_metrics: tuple[str, ...] = STEP_METRICS  # those that ``metrics`` holds
    #: Name of a step metric -> its value for each step. Arrays of doubles: 8 bytes per value.
    history: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in STEP_METRICS}
    )
    continues: str = ""  # program and step that an imported run began at
    started_from: str = ""  # digest of the weights that a run with --from began with

    def add_step(self, ended: StepEnded) -> None:
        """Count a step, and append its metrics to the history."""
        self.step = ended.step
        self.tokens_seen += ended.tokens
        self.elapsed_seconds += ended.seconds
        self.metrics = {name: getattr(ended, name) for name in self.step_metrics}
        for name, column in self.history.items():
            column.append(getattr(ended, name))

    def restore(self, record: RunRecord, *, step: int, metrics: Mapping[str, float]) -> None:
        """Restore everything but the history from a checkpoint."""
        self.step = step
        self.tokens_seen = record.tokens_seen or 0
        self.elapsed_seconds = record.elapsed_seconds or 0.0
        self.continues = record.continues
        self.started_from = record.fingerprints.get("from", "")
        self.metrics = dict(metrics)
        self.evaluations = self.evaluations.restore(record.evaluations)

    def history_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The history as float64[step] of each name; copies."""
        return {name: np.array(column, np.float64) for name, column in self.history.items()}

    def restore_history(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of :meth:`history_arrays`."""
        self.history = {name: array("d", np.asarray(arrays[name]).tolist()) for name in STEP_METRICS}

    def snapshot(self, *, out: Path, checkpoint: Path | None) -> RunState:
        """The state of a running run."""
        rates, evaluations = self.history["learning_rate"], self.evaluations
        best, loss = evaluations.best, evaluations.loss
        return RunState(
            out=out,
            running=True,
            step=self.step,
            max_steps=self.max_steps,
            epoch_steps=self.epoch_steps,
            tokens_seen=self.tokens_seen,
            elapsed_seconds=self.elapsed_seconds,
            learning_rate=rates[-1] if rates else None,
            metrics=dict(self.metrics) if loss is None else {**self.metrics, "eval_loss": loss},
            best=None if best is None else Best(evaluations.metric, best, evaluations.best_step),
            checkpoint=checkpoint,
        )

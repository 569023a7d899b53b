"""How far a run is: the mutable counters of the loop, and the immutable state that any thread may read."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrust.config import STEP_METRICS
from distrust.run_record import RunRecord
from distrust.training.best_tracker import BestTracker
from distrust.training.events import StepEnded


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: name of the metric.
        value: the lowest or highest value, depending on ``metric_mode``.
        step: number of the optimizer step that it followed.
    """

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is: an immutable value, so any thread may read it.

    Attributes:
        out: the folder of the run.
        running: whether the run is in progress.
        step: optimizer steps made, over all sessions.
        max_steps: optimizer steps of the whole run; None until known.
        epoch_steps: optimizer steps of one pass over the data; None until known.
        tokens_seen: trained tokens of all steps so far.
        elapsed_seconds: time spent in steps, over all sessions.
        learning_rate: learning rate of the last step.
        metrics: metrics of the last step, by name, with those of an evaluation after it; always includes the
            latest ``eval_loss``.
        best: the best evaluation.
        checkpoint: path of the newest durable checkpoint.
    """

    out: Path
    running: bool = False
    step: int = 0
    max_steps: int | None = None
    epoch_steps: float | None = None
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    learning_rate: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None
    checkpoint: Path | None = None

    @property
    def epoch(self) -> float | None:
        """Passes over the data, as a fraction."""
        return None if self.epoch_steps is None else self.step / self.epoch_steps


@dataclass(slots=True)
class Progress:
    """Counters and history of a run, updated after each step."""

    step: int = 0  # optimizer steps made
    max_steps: int | None = None  # optimizer steps of the whole run; None until known
    epoch_steps: float | None = None  # optimizer steps of one pass over the data; None until known
    tokens_seen: int = 0  # trained tokens of all steps so far
    elapsed_seconds: float = 0.0  # time spent in steps, over all sessions
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step, and of an evaluation after it
    evaluations: BestTracker = field(default_factory=BestTracker)
    #: Name of a step metric -> its value for each step. Arrays of doubles: 8 bytes per value.
    history: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in STEP_METRICS}
    )
    continues: str = ""  # program and step that an imported run began at

    def add_step(self, ended: StepEnded) -> None:
        """Count a step, and append its metrics to the history."""
        self.step = ended.step
        self.tokens_seen += ended.tokens
        self.elapsed_seconds += ended.seconds
        self.metrics = {name: getattr(ended, name) for name in self.history}
        for name, column in self.history.items():
            column.append(self.metrics[name])

    def restore(self, record: RunRecord, *, step: int, metrics: Mapping[str, float]) -> None:
        """Restore everything but the history from a checkpoint."""
        self.step = step
        self.tokens_seen = record.tokens_seen or 0
        self.elapsed_seconds = record.elapsed_seconds or 0.0
        self.continues = record.continues
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

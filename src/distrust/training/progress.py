"""How far a run is: what is counted and remembered from step to step, beside the engine's own state."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distrust.config import STEP_METRICS
from distrust.training.best_tracker import BestTracker
from distrust.training.imported import CONTINUES


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps made.
        tokens_seen: learned tokens of these steps.
        elapsed_seconds: time spent in them, over all sessions.
        metrics: those of the step: those of an evaluation are there only if there was one.
        evaluations: what the evaluations so far have come to.
        history: by name, the value of each step.
        continues: what the run was begun as by another program; empty where it was begun here.
    """

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: BestTracker = field(default_factory=BestTracker)
    history: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in STEP_METRICS}
    )
    continues: str = ""

    def remember(self, values: object) -> None:
        """Add a step's values, its attributes of these names, to the history; they are the metrics now."""
        self.metrics = {name: getattr(values, name) for name in self.history}
        for name, column in self.history.items():
            column.append(self.metrics[name])

    def restore(
        self, *, step: int, metadata: Mapping[str, Any], metrics: Mapping[str, float], run: Mapping[str, Any]
    ) -> None:
        """Take up what the sections of a checkpoint say; the history is :meth:`restore_history`'s."""
        self.step = step
        self.tokens_seen = metadata["tokens_seen"]
        self.elapsed_seconds = run.get("elapsed_seconds", 0.0)
        self.continues = run.get(CONTINUES, "")
        self.metrics = dict(metrics)
        self.evaluations = self.evaluations.restore(run.get("evaluations"))

    def history_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The history as float64[step] of each name."""
        return {name: np.array(column, np.float64) for name, column in self.history.items()}

    def restore_history(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of :meth:`history_arrays`."""
        self.history = {name: array("d", np.asarray(arrays[name]).tolist()) for name in STEP_METRICS}

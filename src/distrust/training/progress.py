"""How far a run is: what is counted and remembered from step to step, beside the engine's own state."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: What is kept of each step.
HISTORY = ("loss", "weighted_loss", "distrust", "gradient_norm", "learning_rate")


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps made.
        tokens_seen: learned tokens of these steps.
        elapsed_seconds: time spent in them, over all sessions.
        metrics: the latest value of each metric.
        history: by name, the value of each step.
    """

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    history: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in HISTORY})

    def remember(self, values: object) -> None:
        """Add a step's values to the history: its attributes of these names."""
        for name, column in self.history.items():
            column.append(getattr(values, name))

    def history_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The history as float64[step] of each name."""
        return {name: np.array(column, np.float64) for name, column in self.history.items()}

    def restore_history(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of :meth:`history_arrays`."""
        self.history = {name: array("d", np.asarray(arrays[name]).tolist()) for name in HISTORY}

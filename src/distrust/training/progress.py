"""How far a run is: what is counted and remembered from step to step, beside the engine's own state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: What is kept of each step, in the order of a history row.
HISTORY = ("loss", "weighted_loss", "distrust", "gradient_norm", "learning_rate")


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps made.
        tokens_seen: learned tokens of these steps.
        elapsed_seconds: time spent in them, over all sessions.
        metrics: the latest value of each metric.
        history: of each step, the values named in :data:`HISTORY`.
    """

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[tuple[float, ...]] = field(default_factory=list)

    def history_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The history as float64[step] of each name."""
        table = np.asarray(self.history, np.float64).reshape(-1, len(HISTORY))
        return {name: table[:, column].copy() for column, name in enumerate(HISTORY)}

    def restore_history(self, arrays: Mapping[str, Any]) -> None:
        """The inverse of :meth:`history_arrays`."""
        self.history = list(zip(*(np.asarray(arrays[name]).tolist() for name in HISTORY), strict=True))

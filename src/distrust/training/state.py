"""Where a run is: an immutable value that is replaced as a whole, so that any thread may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: its name.
        value: the lowest or highest, as ``metric_mode`` says.
        step: optimizer steps made by then.
    """

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run is.

    Attributes:
        out: the folder of the run.
        running: whether it is under way.
        step: optimizer steps made, over all sessions.
        max_steps: those of the whole run; None until it is known.
        epoch_steps: optimizer steps of one pass over the data; None until they are known.
        tokens_seen: learned tokens of these steps.
        elapsed_seconds: time spent in them.
        learning_rate: of the last step.
        metrics: of the last step, by name; those of an evaluation where there was one then, and always the
            latest ``eval_loss``.
        best: the best evaluation.
        checkpoint: the newest durable checkpoint.
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

"""Going on with what another program began: its checkpoint becomes one of this run, once.

Such a checkpoint says in ``run`` which program made it, and knows of the options only some. Those are
compared as at any resume; for the others the run's own hold from here on. From the first save on the run is
like any other: nothing below is asked again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distrust.checkpoint import Checkpoint
from distrust.config import STEP_METRICS, TrainConfig
from distrust.errors import ConfigError, DistrustWarning, ResumeRefused, readable

#: In ``run`` of a converted checkpoint: the name of the format that it came from.
BEGUN_ELSEWHERE = "begun_elsewhere"
#: There, too: a list of lines, what the format holds that is not taken over, or lacks.
NOT_TAKEN_OVER = "not_taken_over"
#: In ``run`` of what is saved after that: where it began.
CONTINUES = "continues"
#: Of what a run remembers there are some numbers for each step.
MAX_STEP = 10_000_000


def is_begun_elsewhere(run: Mapping[str, Any]) -> bool:
    """Whether another program made this step, by the section ``run`` of its checkpoint."""
    return bool(run.get(BEGUN_ELSEWHERE))


def adopted(checkpoint: Checkpoint, config: TrainConfig, *, where: str) -> Checkpoint:
    """A checkpoint that was begun elsewhere, completed; any other as it is.

    Args:
        checkpoint: what the run goes on from.
        config: what the user asks for: it completes the options that the checkpoint knows.
        where: the run, for the message.

    Raises:
        ResumeRefused: if its step is beyond what a run can remember.
    """
    if not is_begun_elsewhere(checkpoint.run):
        return checkpoint
    if checkpoint.step > MAX_STEP:
        raise ResumeRefused(f"{where}: step {checkpoint.step} is beyond {MAX_STEP}, where no run goes on")
    tokens = checkpoint.metadata.get("tokens_seen")
    optimizer = checkpoint.optimizer
    if "m" in optimizer and "step" not in optimizer:  # who saves moments only makes a step each step
        optimizer = {**optimizer, "step": checkpoint.step}
    return replace(
        checkpoint,
        optimizer=optimizer,
        config={**config.with_effect("result"), **checkpoint.config},
        history={name: _column(checkpoint.history.get(name), checkpoint.step) for name in STEP_METRICS},
        metadata={"tokens_seen": tokens if type(tokens) is int else 0},
        metrics={name: value for name, value in checkpoint.metrics.items() if name in STEP_METRICS},
        run={**checkpoint.run, CONTINUES: f"{_origin(checkpoint)}, step {checkpoint.step}"},
    )


def require_steps_left(checkpoint: Checkpoint, *, max_steps: int, where: Path) -> None:
    """Refuse to end before the step that was reached elsewhere.

    Raises:
        ConfigError: saying how many steps there have to be.
    """
    if is_begun_elsewhere(checkpoint.run) and checkpoint.step >= max_steps:
        raise ConfigError(
            f"--max-steps: the run has {max_steps} steps, and {where} was begun elsewhere and is at step "
            f"{checkpoint.step} already; give more: they are those of the whole run"
        )


def tell(checkpoint: Checkpoint, *, where: Path) -> None:
    """Warn, in a few lines, of what is taken over and what is not."""
    if not is_begun_elsewhere(checkpoint.run):
        return
    step, lines = checkpoint.step, checkpoint.run.get(NOT_TAKEN_OVER)
    lost = [readable(line) for line in lines if type(line) is str] if type(lines) is list else []
    warnings.warn(
        f"{where} was begun elsewhere ({_origin(checkpoint)}): weights, optimizer and history are those of "
        f"its step {step}. From step {step + 1} on, data, weighting, learning rate and random numbers are "
        "this run's, as if it had made the steps before; on which base model, data and schedule those were "
        "made is not known" + "".join(f"\n  not taken over: {line}" for line in lost),
        DistrustWarning,
        stacklevel=3,
    )


def _origin(checkpoint: Checkpoint) -> str:
    return readable(str(checkpoint.run[BEGUN_ELSEWHERE]))


def _column(found: Any, step: int) -> np.ndarray[Any, Any]:
    """float64[step] of what is known of each step, NaN where that is nothing."""
    try:
        values = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    return values if values.shape == (step,) else np.full(step, np.nan)

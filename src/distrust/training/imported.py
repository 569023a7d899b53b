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
from distrust.config import STEP_METRICS, TrainConfig, flag
from distrust.errors import ConfigError, DistrustWarning, ResumeRefused, quote_untrusted
from distrust.importers.imported import BEGUN_ELSEWHERE

#: In ``run`` of a converted checkpoint: a list of lines, what is not taken over of it, or what it lacks.
DROPPED = "not_taken_over"
_NO_MOMENTS = "AdamW's moments, which it has not: they begin at zero"
#: In ``run`` of what is saved after that: where it began.
CONTINUES = "continues"
#: In ``run`` of what is taken up, and never saved: options that the checkpoint does not know.
_UNKNOWN = "unknown"
#: Of what a run remembers there are some numbers for each step.
MAX_STEP = 10_000_000
#: What an adapter is beside its arrays, which tell the rest: what is not known of it is told.
_OF_AN_ADAPTER = ("lora_alpha", "rslora", "lora_dropout")


def is_imported(run: Mapping[str, Any]) -> bool:
    """Whether another program made this step, by the section ``run`` of its checkpoint."""
    return bool(run.get(BEGUN_ELSEWHERE))


def adopt_imported(checkpoint: Checkpoint, config: TrainConfig, *, where: str) -> Checkpoint:
    """A checkpoint that was begun elsewhere, completed; any other as it is.

    Args:
        checkpoint: what the run goes on from.
        config: what the user asks for: it completes the options that the checkpoint knows.
        where: the run, for the message.

    Raises:
        ResumeRefused: if its step is beyond what a run can remember.
    """
    if not is_imported(checkpoint.run):
        return checkpoint
    if checkpoint.step > MAX_STEP:
        raise ResumeRefused(f"{where}: step {checkpoint.step} is beyond {MAX_STEP}, where no run goes on")
    tokens = checkpoint.metadata.get("tokens_seen")
    optimizer, lost = checkpoint.optimizer, list_dropped(checkpoint)
    if not has_moments(optimizer):
        optimizer = {}
    elif "m" in optimizer and "step" not in optimizer:  # who saves moments only makes a step each step
        optimizer = {**optimizer, "step": checkpoint.step}
    found = {name: _numbers(checkpoint.history.get(name)) for name in STEP_METRICS}
    lost += [
        f"the {name} of {values.size} steps: it is not said of which of the {checkpoint.step}"
        for name, values in found.items()
        if values.size and values.shape != (checkpoint.step,)
    ]
    return replace(
        checkpoint,
        optimizer=optimizer,
        config=complete_config(checkpoint.config, config),
        history={name: _column(values, checkpoint.step) for name, values in found.items()},
        metadata={"tokens_seen": tokens if type(tokens) is int else 0},
        metrics={name: value for name, value in checkpoint.metrics.items() if name in STEP_METRICS},
        run={
            **checkpoint.run,
            CONTINUES: f"{_origin(checkpoint)}, step {checkpoint.step}",
            DROPPED: lost,
            _UNKNOWN: [
                f"{flag(name)} {getattr(config, name)}"
                for name in _OF_AN_ADAPTER
                if config.lora_rank and name not in checkpoint.config
            ],
        },
    )


def complete_config(known: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The options that a checkpoint knows, and for all others those that the user asks for."""
    return {**config.with_effect("result"), **known}


def has_moments(optimizer: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state, in the form of either engine, is more than its options."""
    return bool(optimizer.get("state")) or bool(optimizer.get("m") and optimizer.get("v"))


def list_dropped(checkpoint: Checkpoint) -> list[str]:
    """A line for each thing that a checkpoint begun elsewhere lacks, or that no run here takes over."""
    lines = checkpoint.run.get(DROPPED)
    lost = [quote_untrusted(line) for line in lines if type(line) is str] if type(lines) is list else []
    return lost if has_moments(checkpoint.optimizer) else [*lost, _NO_MOMENTS]


def require_steps_left(checkpoint: Checkpoint, *, max_steps: int, where: Path) -> None:
    """Refuse to end before the step that was reached elsewhere.

    Raises:
        ConfigError: saying how many steps there have to be.
    """
    if is_imported(checkpoint.run) and checkpoint.step >= max_steps:
        raise ConfigError(
            f"--max-steps: the run has {max_steps} steps, and {where} was begun elsewhere and is at step "
            f"{checkpoint.step} already; give more: they are those of the whole run"
        )


def warn_imported(checkpoint: Checkpoint, *, where: Path) -> None:
    """Warn, in a few lines, of what is taken over and what is not."""
    if not is_imported(checkpoint.run):
        return
    step, origin = checkpoint.step, _origin(checkpoint)
    history = any(np.isfinite(values).any() for values in checkpoint.history.values())
    taken = [
        "weights",
        *(["optimizer"] if has_moments(checkpoint.optimizer) else []),
        *(["history"] if history else []),
    ]
    unknown = checkpoint.run.get(_UNKNOWN) or []
    warnings.warn(
        f"{where} was begun elsewhere ({origin}): {_join_words(taken)} are those of its step {step}. "
        f"From step {step + 1} on, data, weighting, learning rate and random numbers are this run's, as if "
        "it had made the steps before; on which base model, data and schedule those were made is not known"
        + "".join(f"\n  not taken over: {line}" for line in checkpoint.run[DROPPED])
        + (f"\n  not known there, so as this run has them: {', '.join(unknown)}" if unknown else ""),
        DistrustWarning,
        stacklevel=3,
    )


def _join_words(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _origin(checkpoint: Checkpoint) -> str:
    return quote_untrusted(str(checkpoint.run[BEGUN_ELSEWHERE]))


def _numbers(found: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray([] if found is None else found, np.float64)
    except (TypeError, ValueError):
        return np.empty(0)


def _column(values: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    """float64[step] of what is known of each step, NaN where that is nothing."""
    return values if values.shape == (step,) else np.full(step, np.nan)

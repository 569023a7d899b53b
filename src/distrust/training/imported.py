"""Resumes what another program began: its checkpoint becomes one of this run, once.

Such a checkpoint records which program wrote it, and only some of the options. Those are compared as at any
resume; for the others the run's own values apply from here on. After the run's first save it is a run like
any other, and nothing below applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distrust.checkpoint import Checkpoint
from distrust.config import TrainConfig, flag
from distrust.errors import ConfigError, ResumeRefused, quote_untrusted, warn
from distrust.option_values import STEP_METRICS
from distrust.run_record import RunRecord

#: A run holds numbers in memory for each of its steps, so an imported step number is bounded.
MAX_STEP = 10_000_000
_NO_MOMENTS = "AdamW's moments: the checkpoint has none, so they start at zero"
#: Adapter options that the adapter's arrays do not reveal.
_ADAPTER_OPTIONS = ("lora_alpha", "rslora", "lora_dropout")


def adopt_imported(checkpoint: Checkpoint, config: TrainConfig) -> tuple[Checkpoint, RunRecord]:
    """An imported checkpoint and its record, completed; those of this trainer unchanged."""
    record = RunRecord.from_checkpoint(checkpoint)
    if not record.imported_from:  # the trainer's own
        return checkpoint, record
    step = checkpoint.step
    if step > MAX_STEP:
        raise ResumeRefused(
            f"{config.run_directory}: step {step} exceeds {MAX_STEP}, the largest step of an imported run"
        )
    optimizer = checkpoint.optimizer
    if not has_moments(optimizer):
        optimizer = {}  # the engine starts with zero moments
    elif "m" in optimizer and "step" not in optimizer:  # a program that saves only moments updates every step
        optimizer = {**optimizer, "step": step}
    history = {name: _to_numbers(checkpoint.history.get(name)) for name in STEP_METRICS}
    dropped = list_dropped(checkpoint) + [
        f"the {name} of {values.size} steps: it is not known which of the {step} steps they are of"
        for name, values in history.items()
        if values.size and values.shape != (step,)
    ]
    adopted = replace(
        checkpoint,
        optimizer=optimizer,
        history={
            name: values if values.shape == (step,) else np.full(step, np.nan)
            for name, values in history.items()
        },
        # Evaluations of another program were made on other data.
        metrics={name: value for name, value in checkpoint.metrics.items() if name in STEP_METRICS},
    )
    return adopted, replace(
        record,
        config=complete_config(record.config, config),
        continues=f"{quote_untrusted(record.imported_from)}, step {step}",
        dropped=tuple(dropped),
        assumed=tuple(
            f"{flag(name)} {getattr(config, name)}"
            for name in _ADAPTER_OPTIONS
            if config.lora_rank and name not in record.config
        ),
    )


def complete_config(known: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The options that a checkpoint records; for all others, those that the user asks for."""
    return {**config.with_effect("result"), **known}  # what the checkpoint records takes precedence


def has_moments(optimizer: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state, in the form of either engine, contains moments."""
    return bool(optimizer.get("state")) or bool(optimizer.get("m") and optimizer.get("v"))


def list_dropped(checkpoint: Checkpoint) -> list[str]:
    """A line for each thing that an imported checkpoint lacks, or that the import did not keep."""
    dropped = [quote_untrusted(line) for line in RunRecord.from_checkpoint(checkpoint).dropped]
    return dropped if has_moments(checkpoint.optimizer) else [*dropped, _NO_MOMENTS]


def require_steps_left(record: RunRecord, *, step: int, max_steps: int, where: Path) -> None:
    """Refuse a run that would end before the step of the imported checkpoint."""
    if record.imported_from and step >= max_steps:
        raise ConfigError(
            f"--max-steps: the run has {max_steps} steps, but {where} was imported at step {step}; "
            "give more: the number counts the steps of the whole run"
        )


def warn_imported(checkpoint: Checkpoint, record: RunRecord, *, where: Path) -> None:
    """Warn of what an adopted checkpoint keeps, drops and assumes."""
    if not record.imported_from:
        return
    step, program = checkpoint.step, quote_untrusted(record.imported_from)
    has_history = any(np.isfinite(values).any() for values in checkpoint.history.values())
    restored = {"weights": True, "optimizer": has_moments(checkpoint.optimizer), "history": has_history}
    sections = [name for name, is_restored in restored.items() if is_restored]
    summary = (
        f"{where} is imported ({program}): {_join_words(sections)} are those of its step {step}. "
        f"From step {step + 1} on, data, weighting, learning rate and random numbers are this run's, as if "
        "it had made the steps before. The base model, data and schedule of those steps are not known"
    )
    assumed = f"  not recorded, so taken from this run: {', '.join(record.assumed)}"
    dropped = [f"  dropped: {line}" for line in record.dropped]
    warn([summary, *dropped, *([assumed] if record.assumed else [])])


def _join_words(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _to_numbers(values: Any) -> np.ndarray[Any, Any]:
    try:  # a foreign history may hold anything
        return np.asarray([] if values is None else values, np.float64)
    except (TypeError, ValueError):
        return np.empty(0)

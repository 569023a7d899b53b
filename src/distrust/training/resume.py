"""Whether a checkpoint continues the run that a config describes. Comparisons collect all differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from distrust.checkpoint import Checkpoint
from distrust.config import TrainConfig, flag, key
from distrust.contract import DEFAULT_RECORDED_ENGINE, Engine, EngineState
from distrust.errors import ResumeRefused, warn
from distrust.run_record import RunRecord
from distrust.training.prepare_data import PreparedData
from distrust.training.progress import Progress

#: Options whose default depends on the data: a resume that leaves them out keeps the saved value.
FIXED_AT_START = ("max_length", "schedule_steps")
#: What runs did before an option existed, where that differs from the option's default.
BEFORE_THE_OPTION = {"clipping": "plain"}


def merge_saved_options(config: TrainConfig, saved: Mapping[str, Any]) -> TrainConfig:
    """The config, with options that it leaves open taken from the checkpoint.

    Raises ResumeRefused with a line for each option that would change the result.
    """
    filled, differences = {}, []
    defaults = {key(option.name): option.default for option in fields(config)}
    for name, value in config.with_effect("result").items():
        # A run that is older than an option was trained with the option's default, as a rule.
        previous = saved.get(name, BEFORE_THE_OPTION.get(name, defaults[name]))
        if value is None and name in FIXED_AT_START:  # its default may differ by now
            filled[name] = previous
        elif value != previous:
            differences.append(f"{flag(name)} was {_format(previous)}, is {_format(value)}")
    if differences:
        raise _refusal(config.run_directory, differences)
    return replace(config, **filled)


def restore(
    checkpoint: Checkpoint, record: RunRecord, *, engine: Engine, data: PreparedData, progress: Progress
) -> None:
    """Load a checkpoint into the engine and the progress of a run.

    Raises ResumeRefused if it was trained on other data or another base model, or does not fit the engine.
    """
    _require_same_content(fingerprints(data, engine), record, data.config)
    recorded = dict(record.environment)
    if data.config.threads is None:  # the number of threads changes the last bits
        engine.restore_environment(recorded)
    engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
    quantized = data.config.quantization != "none"
    for difference in _environment_differences(engine.environment(), recorded, quantized=quantized):
        warn(f"no longer bit-identical: {difference}")
    if progress.evaluations.used_other_data(record.evaluations):
        warn(
            "the evaluation data differs from that of the run so far: the best checkpoint and "
            "the patience of early stopping start afresh"
        )
    progress.restore_history(checkpoint.history)
    progress.restore(record, step=checkpoint.step, metrics=checkpoint.metrics)


def fingerprints(data: PreparedData, engine: Engine) -> dict[str, str]:
    """Digests of the training data and of the base model."""
    return {"data": data.corpus.fingerprint, "model": engine.fingerprint()}


def _require_same_content(current: Mapping[str, str], record: RunRecord, config: TrainConfig) -> None:
    """Refuse to resume with other data or another base model."""
    saved, imported = record.fingerprints, bool(record.imported_from)
    differences = [
        f"{flag(name)} {_format(getattr(config, name))}: its content is not that of the run "
        f"(was {str(saved.get(name))[:12]}, is {digest[:12]})"
        for name, digest in current.items()
        # An imported checkpoint need not record a fingerprint.
        if saved.get(name) != digest and not (imported and name not in saved)
    ]
    if differences:
        raise _refusal(config.run_directory, differences)


def _environment_differences(
    current: Mapping[str, Any], recorded: Mapping[str, Any], *, quantized: bool
) -> list[str]:
    """A line for each difference that may change the last bits."""
    engine, previous = current.get("engine"), recorded.get("engine", DEFAULT_RECORDED_ENGINE)
    if recorded and engine is not None and engine != previous:
        return [
            f"the run was trained with --engine {previous}, and resumes with {engine}. Weights, moments and "
            "the step number are kept; random generator states are not, because each step seeds its own"
            + ("; the engines quantize the base differently" if quantized else "")
        ]
    return [
        f"{name} was {_format(recorded[name])}, is {_format(value)}"
        for name, value in current.items()
        if name in recorded and recorded[name] != value
    ]


def _refusal(out: Path, differences: list[str]) -> ResumeRefused:
    lines = [
        f"{out}: cannot resume the run in that folder:",
        *(f"  {line}" for line in differences),
        "give the options of that run, or another --out",
    ]
    return ResumeRefused(lines, differences)


def _format(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

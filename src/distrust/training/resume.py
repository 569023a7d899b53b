"""Whether a checkpoint continues the run that a config describes, and what a run with ``from_`` starts from.

Comparisons collect all differences.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from distrust.checkpoint import Checkpoint
from distrust.config import TrainConfig, flag, key
from distrust.config_text import RUN_CONFIG
from distrust.contract import DEFAULT_RECORDED_ENGINE, Engine, EngineState
from distrust.errors import ConfigError, DistrustError, ErrorTranslator, ResumeRefused, warn
from distrust.options import as_text
from distrust.run_record import RunRecord
from distrust.training.prepare_data import PreparedData
from distrust.training.progress import Progress

#: Options whose default depends on the data or the day: a resume that leaves them out keeps the saved value.
FIXED_AT_START = ("max_length", "schedule_steps", "date")
#: Options of the data that say where it is, not how it is read.
NAMES = ("model", "data", "cache_dir", "max_record_bytes")
#: Options that a run with ``from_`` takes from its source, besides those of model, adapter and data; and of
#: these the ones that it does not: they are of the machine or of the day.
TAKEN, NOT_TAKEN = ("dtype", "quantization"), ("cache_dir", "max_record_bytes", "date")
#: What runs did before an option existed, where that differs from the option's default.
BEFORE_THE_OPTION = {"clipping": "plain", "weighting": "monotone", "dtype": "float32"}
#: What "auto" becomes when a run begins: it depends on the data, or on the device.
SETTLED = {"weighting": ("monotone", "off"), "dtype": ("float32", "bfloat16")}


#: What holds of an environment that does not record otherwise.
EXACT_SUMS = {"reduction": "exact", "shard": "none", "ranks": "any number"}


@dataclass(frozen=True, slots=True)
class Start:
    """Trained weights of another run or program."""

    model: Mapping[str, Any]  # name -> array, in the form of either engine
    digest: str  # of the weights; checkpoints record it
    base: str | None  # fingerprint of the base model that they were trained on, if it is known
    dtype: str  # of that base model, which its fingerprint depends on

    def load(self, engine: Engine, config: TrainConfig) -> None:
        """Load the weights, with a new optimizer; ResumeRefused if they do not fit the engine's model."""
        if self.base not in (None, engine.fingerprint()):
            problem = f"was not trained on the weights of --model {config.model}"
            if self.dtype != config.dtype:
                problem = f"was trained with --dtype {self.dtype}, not {config.dtype}"
            raise ResumeRefused(f"--from {config.from_}: {problem}")
        engine.load_state(EngineState(self.model, {}, {}))


#: Reads what a config starts from; also returns the config with the options that it takes from there.
ReadStart = Callable[[TrainConfig], tuple[TrainConfig, Start]]


def merge_saved_options(config: TrainConfig, record: RunRecord) -> tuple[TrainConfig, list[str]]:
    """The config with the run's options that change the result, and a line for each one that differs.

    Options that the config leaves open are no difference. With those of the run, its data can be compared.
    """
    if config.from_:
        config = take_open_options(config, record.train_config(where=str(config.run_directory)))
    saved, differences = {}, []
    for option in fields(config):
        name, value = key(option.name), getattr(config, option.name)
        # A run that does not record an option was trained with the option's default, as a rule.
        previous = record.options.get(name, BEFORE_THE_OPTION.get(name, option.default))
        is_auto = value == "auto" and previous in SETTLED.get(name, ())
        if is_auto or (value is None and name in FIXED_AT_START):
            saved[option.name] = previous  # the default may differ by now
        elif value != previous and (option.metadata["effect"] == "result" or name == "from"):
            saved[option.name] = previous
            differences.append(f"{flag(name)} was {as_text(previous)}, is {as_text(value)}")
    try:
        return replace(config, **saved), differences
    except ConfigError:
        if differences:  # what is left of the config contradicts them
            raise _refusal(config.run_directory, differences) from None
        raise


def take_open_options(config: TrainConfig, source: TrainConfig) -> TrainConfig:
    """A config with ``from_``, in which the options that are not given are those of the source."""
    groups = {"Model", "LoRA"} | ({"Data", "Weighting"} if config.data is None else set())
    inherited = {
        option.name: getattr(source, option.name)
        for option in fields(config)
        if (option.metadata["group"] in groups and option.name not in NOT_TAKEN) or option.name in TAKEN
        if getattr(config, option.name) == option.default
    }
    return replace(config, **inherited)


def restore(
    checkpoint: Checkpoint,
    record: RunRecord,
    *,
    engine: Engine,
    data: PreparedData,
    progress: Progress,
    differences: Sequence[str] = (),
) -> None:
    """Load a checkpoint into the engine and the progress of a run.

    Raises ResumeRefused if there are differences already, if it was trained on other data or another base
    model, or if it does not fit the engine.
    """
    all_differences = [*differences, *_content_differences(fingerprints(data, engine), record, data.config)]
    if all_differences:
        raise _refusal(data.config.run_directory, all_differences)
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


def errors_with(differences: list[str], config: TrainConfig) -> AbstractContextManager[None]:
    """Context manager that adds differences of options to an error: all are reported at once."""

    def add(error: DistrustError) -> DistrustError:
        if not differences or isinstance(error, ResumeRefused):
            return error
        return _refusal(config.run_directory, [*differences, *str(error).splitlines()])

    return ErrorTranslator((DistrustError,), add)


def fit_schedule(data: PreparedData, *, given: str, step: int, source: Path) -> PreparedData:
    """The data with a schedule that covers every step of a run that has made ``step`` of them, in ``source``.

    The schedule "wsd" grows, if that changes no step that was made. Otherwise raises ConfigError: steps at
    learning rate 0 would train nothing. ``given`` is the option that asks for the number of steps.
    """
    config, last = data.config, data.max_steps
    end = max(data.schedule_steps, data.warmup_steps)  # a longer warm-up postpones the end
    if config.schedule == "constant" or last <= end or step >= last:
        return data
    longer = replace(data, schedule_steps=last, config=replace(config, schedule_steps=last))
    changed = (n for n in range(1, step + 1) if data.learning_rate(n) != longer.learning_rate(n))
    unchanged = next(changed, step + 1) - 1  # steps that a longer schedule leaves as they were
    if config.schedule == "wsd" and step and unchanged == step:
        return longer
    advice = "give --schedule-steps, or --schedule constant or wsd, with which it may become longer"
    if step:
        advice = "begin a run with --schedule constant or wsd, which may become longer"
        if config.schedule == "wsd" and unchanged:
            branch = f"--config {shlex.quote(str(source / RUN_CONFIG))} --branch NEW --from-step {unchanged}"
            advice = f"branch off before its decay: {branch}, or less"
        elif config.schedule == "wsd":
            advice = "begin a run with --schedule constant, or without --warmup-ratio"
        advice += f"; or a new run from the weights of this one: --from {shlex.quote(str(source))} --out NEW"
    warmup_note = f" with the warm-up, which is longer than its {data.schedule_steps} steps,"
    warmup_note = warmup_note if end > data.schedule_steps else ""
    raise ConfigError(
        f"{given}: the run would have {last} steps, but its schedule ends{warmup_note} at step {end}, and "
        f"after that the learning rate is 0; {advice}"
    )


def fingerprints(data: PreparedData, engine: Engine) -> dict[str, str]:
    """Digests of the training data and of the base model."""
    return {"data": data.corpus.fingerprint, "model": engine.fingerprint()}


def _content_differences(current: Mapping[str, str], record: RunRecord, config: TrainConfig) -> Iterator[str]:
    """A line for other data and for another base model, with the options that may be the reason."""
    saved, imported = record.fingerprints, bool(record.imported_from)
    for name, digest in current.items():
        # An imported checkpoint need not record a fingerprint.
        if saved.get(name) == digest or (imported and name not in saved):
            continue
        digests = f"(was {str(saved.get(name))[:12]}, is {digest[:12]})"
        reasons = "; ".join(_reading_differences(record, config)) if name == "data" else ""
        problem = f"is read differently: {reasons}" if reasons else "its content is not that of the run"
        yield f"{flag(name)} {as_text(getattr(config, name))}: {problem} {digests}"


def _reading_differences(record: RunRecord, config: TrainConfig) -> Iterator[str]:
    """The options that shape the data and differ from the run's."""
    for option in fields(config):
        name, value = key(option.name), getattr(config, option.name)
        is_shaping = option.metadata["effect"] == "free" and option.metadata["group"] in ("Model", "Data")
        if is_shaping and name not in NAMES and record.settings.get(name, value) != value:
            yield f"{flag(name)} was {as_text(record.settings[name])}, is {as_text(value)}"


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
    if recorded:  # sums of several ranks that are those of one process are not recorded
        current, recorded = {**EXACT_SUMS, **current}, {**EXACT_SUMS, **recorded}
    return [
        f"{name} was {as_text(recorded[name])}, is {as_text(value)}"
        for name, value in current.items()
        if name in recorded and recorded[name] != value
        if name != "deterministic" or recorded[name]  # a run that was not cannot become less so
    ]


def _refusal(out: Path, differences: Sequence[str]) -> ResumeRefused:
    lines = [
        f"{out}: cannot resume the run in that folder:",
        *(f"  {line}" for line in differences),
        "give the options of that run, or another --out",
    ]
    return ResumeRefused(lines, differences)

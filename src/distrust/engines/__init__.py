"""The frameworks that can train, each behind the contract of ``training/engine.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from distrust import config as options
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, image
from distrust.checkpoint.store import checkpoint_directory, find, scan
from distrust.config import TrainConfig, key
from distrust.engines.source import locate
from distrust.errors import ConfigError, ModelError, ResumeRefused
from distrust.training.engine import Engine, EngineState
from distrust.training.resume import FINGERPRINTS

#: Of the arrays that the engines here take.
FRAMEWORK: Literal["torch"] = "torch"


def create(config: TrainConfig) -> Engine:
    """The engine that trains ``config``: model, tokenizer, adapter and optimizer, loaded.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
    """
    locate(config.model)
    from distrust.engines.torch.engine import TorchEngine

    return TorchEngine(config)


def config_of(file: CheckpointFile, *, model: str | None = None) -> TrainConfig:
    """The config that a checkpoint was trained with.

    Args:
        file: the checkpoint.
        model: where the base model lies now, if it was moved.

    Raises:
        ConfigError: if the checkpoint was made by something else than this trainer.
    """
    known = {key(field.name) for field in fields(TrainConfig)}
    saved = {**file.header.run_info.get("extra", {}), **file.header.config}
    config = options.from_mapping(
        {name: value for name, value in saved.items() if name in known}, where=str(file.path)
    )
    return config if model is None else replace(config, model=model)


def read_checkpoint(
    target: Path, *, step: int | None = None, best: bool = False
) -> tuple[CheckpointFile, Checkpoint]:
    """The one place that says which checkpoint a target stands for; read, and every byte of it verified.

    Args:
        target: a run, a directory of checkpoints, or a file; of several the newest that is whole.
        step: this one of several.
        best: the best of several, by the metric that the run was told to go by.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        ConfigError: for a step, or the best one, of a single file.
    """
    find(target)
    if not target.is_dir():
        if step is not None or best:
            asked = "--best" if step is None else f"--step {step}"
            raise ConfigError(f"{asked} goes with a run or a directory; {target} is one checkpoint")
        return image.read(target, framework=FRAMEWORK)
    return _manager(checkpoint_directory(target)).choose(step=step, best=best, framework=FRAMEWORK)


def open_checkpoint(
    target: Path,
    *,
    step: int | None = None,
    best: bool = False,
    model: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Engine, CheckpointFile]:
    """An engine with the weights of a checkpoint.

    Args:
        target: a run, a directory of checkpoints, or a file; of several the newest that is whole.
        step: this one of several.
        best: the best of several.
        model: where the base model lies now, if it was moved.
        changes: options in place of the run's, such as the device.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        ModelError: if the base model cannot be loaded.
        ResumeRefused: if it is another base model.
    """
    file, checkpoint = read_checkpoint(target, step=step, best=best)
    return engine_of(file, checkpoint, model=model, changes=changes), file


def engine_of(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    *,
    model: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Engine:
    """The same, of a checkpoint that was read.

    Raises:
        ModelError: if the base model cannot be loaded.
        ResumeRefused: if it is another base model.
    """
    # Compiling pays in training only, and needs a compiler, which may be missing here.
    config = replace(config_of(file, model=model), **{"compile": False, **(changes or {})})
    expected = fingerprint_of(file, "model")
    with base_told(file, config.model, given=model is not None):
        engine = create(config)
    if engine.fingerprint() != expected:
        raise ResumeRefused(f"{file.path}: was not trained on the weights of --model {config.model}")
    engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
    return engine


def fingerprint_of(file: CheckpointFile, what: Literal["model", "data"]) -> str:
    """The fingerprint of the base model, or of the training data, that a checkpoint was trained on.

    Raises:
        ResumeRefused: if it was made by something else than this trainer.
    """
    found: str | None = file.header.config.get(FINGERPRINTS, {}).get(what)
    if found is None:
        known = "base model" if what == "model" else "data"
        raise ResumeRefused(f"{file.path}: was not made by `distrust train`, so its {known} is not known")
    return found


@contextlib.contextmanager
def base_told(file: CheckpointFile, name: str, *, given: bool) -> Iterator[None]:
    """A base model that cannot be loaded inside may have been moved; unless it was given just now.

    Raises:
        ModelError: saying so.
    """
    try:
        yield
    except ModelError as error:
        if given:
            raise
        raise ModelError(
            f"{file.path}: was trained on the model {name}, which cannot be loaded from here; say "
            f"where it lies with --model ({error})"
        ) from error


def _manager(directory: Path) -> CheckpointManager:
    """Of the directory of a run, with the run's own idea of what is best."""
    files = scan(directory).files
    if not files:
        return CheckpointManager(directory)
    run = files[-1].header.run_info.get("extra", {})
    told = {name: run[name] for name in ("metric", "metric_mode") if isinstance(run.get(name), str)}
    return CheckpointManager(directory, **told)

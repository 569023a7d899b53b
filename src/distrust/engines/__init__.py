"""The frameworks that can train, each behind the contract of ``training/engine.py``."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from distrust import config as options
from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, serialization
from distrust.checkpoint.catalog import (
    RUN_SUBDIRECTORY,
    checkpoint_directory,
    is_directory,
    read_header,
    resolve,
    scan,
)
from distrust.checkpoint.foreign import require_converted
from distrust.config import TrainConfig, key
from distrust.contract import Engine, EngineState
from distrust.engines.model_source import locate
from distrust.errors import ConfigError, ModelError, ResumeRefused
from distrust.training import resume_point
from distrust.training.imported import is_imported
from distrust.training.resume import FINGERPRINTS, FIRST_ENGINE

Name = Literal["torch", "mlx"]
#: What each needs, and the extra of this package that brings it.
_NEEDS: dict[Name, tuple[str, str]] = {"torch": ("torch", "train"), "mlx": ("mlx_lm", "mlx")}


def create_engine(config: TrainConfig) -> Engine:
    """The engine that trains ``config``: model, tokenizer, adapter and optimizer, loaded.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine, or the engine is not installed.
    """
    locate(config.model)
    name = select_engine(config)
    require_installed(name)
    if name == "mlx":
        from distrust.engines.mlx.engine import MlxEngine

        return MlxEngine(config)
    from distrust.engines.torch.engine import TorchEngine

    return TorchEngine(config)


def select_engine(config: TrainConfig) -> Name:
    """The engine that a config stands for: the one it names, or the run's, or the machine's own."""
    if config.engine != "auto":
        return config.engine
    for folder in (resume_point.run_folder(config), Path(config.out)):
        files = scan(folder / RUN_SUBDIRECTORY).files
        if files and is_installed(recorded_engine(files[-1])):
            return recorded_engine(files[-1])
    return _default_engine()


def recorded_engine(file: CheckpointFile) -> Name:
    """The engine that a checkpoint was made by."""
    extra = file.header.run_info.get("extra")
    environment = extra.get("environment") if isinstance(extra, dict) else None
    named = environment.get("engine") if isinstance(environment, dict) else None
    return "mlx" if named == "mlx" else FIRST_ENGINE


def generate(engine: Engine, prompt: str, **options: Any) -> str:
    """What a model writes after a prompt: see the engine's own ``generation.generate``."""
    generation = import_module(f"distrust.engines.{engine.framework}.generation")
    text: str = generation.generate(engine, prompt, **options)
    return text


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
    target: Path, *, step: int | None = None, best: bool = False, framework: Name | None = None
) -> tuple[CheckpointFile, Checkpoint]:
    """The one place that says which checkpoint a target stands for; read, and every byte of it verified.

    Args:
        target: a run, a directory of checkpoints, or a file; of several the newest that is whole.
        step: this one of several.
        best: the best of several, by the metric that the run was told to go by.
        framework: of the arrays. Default: that of the engine which made the newest, if it is installed here.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        ConfigError: for a step, or the best one, of a single file.
    """
    resolve(target)
    if framework is None:
        framework = _opener(target)
    if not is_directory(target):
        if step is not None or best:
            asked = "--best" if step is None else f"--step {step}"
            raise ConfigError(f"{asked} goes with a run or a directory; {target} is one checkpoint")
        require_converted(read_header(target))
        return serialization.load(target, framework=framework)
    return _manager(checkpoint_directory(target)).choose(step=step, best=best, framework=framework)


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
    made_for: Name = "mlx" if _is_mlx(checkpoint) else "torch"
    config = replace(
        config_of(file, model=model), **{"compile": False, "engine": made_for, **(changes or {})}
    )
    expected = fingerprint_of(file, "model")
    with base_model_errors(file, config.model, given=model is not None):
        engine = create_engine(config)
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
        if is_imported(file.header.run_info.get("extra", {})):
            raise ResumeRefused(
                f"{file.path}: was begun elsewhere, so its {known} is not known; `distrust train` goes on "
                "with it, and what that saves knows it"
            )
        raise ResumeRefused(f"{file.path}: was not made by `distrust train`, so its {known} is not known")
    return found


@contextlib.contextmanager
def base_model_errors(file: CheckpointFile, name: str, *, given: bool) -> Iterator[None]:
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


def _opener(target: Path) -> Name:
    files = scan(checkpoint_directory(target)).files if is_directory(target) else (read_header(target),)
    made_by = recorded_engine(files[-1]) if files else _default_engine()
    if is_installed(made_by):
        return made_by
    return next((name for name in _NEEDS if is_installed(name)), made_by)


def _is_mlx(checkpoint: Checkpoint) -> bool:
    array = next(iter(checkpoint.model.values()), None)
    return type(array).__module__.partition(".")[0] == "mlx"


def _default_engine() -> Name:
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_installed("mlx") and (apple or not is_installed("torch")) else "torch"


def is_installed(name: Name) -> bool:
    """Whether what an engine needs is there."""
    return find_spec(_NEEDS[name][0]) is not None


def require_installed(name: Name, *, what: str | None = None) -> None:
    """Refuse an engine that is not there.

    Args:
        name: of the engine.
        what: what is to be done with it. Default: what ``--engine`` says.

    Raises:
        ConfigError: saying how to install it.
    """
    if not is_installed(name):
        library, extra = _NEEDS[name]
        needed = (
            f"--engine {name}: {library} is" if what is None else f"{what}, {library} is needed, which is"
        )
        raise ConfigError(f"{needed} not installed; pip install 'distrust-trainer[{extra}]'")


def _manager(directory: Path) -> CheckpointManager:
    """Of the directory of a run, with the run's own idea of what is best."""
    files = scan(directory).files
    if not files:
        return CheckpointManager(directory)
    run = files[-1].header.run_info.get("extra", {})
    told = {name: run[name] for name in ("metric", "metric_mode") if isinstance(run.get(name), str)}
    return CheckpointManager(directory, **told)

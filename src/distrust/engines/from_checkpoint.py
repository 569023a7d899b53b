"""Reads checkpoints and creates engines with their weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, serialization
from distrust.checkpoint.catalog import (
    RUN_SUBDIRECTORY,
    checkpoint_directory,
    is_directory,
    newest,
    read_header,
    resolve,
    scan,
)
from distrust.checkpoint.foreign import require_converted
from distrust.checkpoint.remote.location import Location, Target, parse_target
from distrust.config import TrainConfig
from distrust.config_text import RUN_CONFIG, from_toml
from distrust.contract import Engine, EngineState
from distrust.engines import registry
from distrust.engines.loading import hub_name
from distrust.engines.registry import EngineName, create_engine
from distrust.engines.target_modules import as_trained
from distrust.errors import ConfigError, ErrorTranslator, ModelError, ResumeRefused
from distrust.remote_copies import fetch_checkpoint, fetch_files
from distrust.run_record import RunRecord


def read_checkpoint(
    target: Target, *, step: int | None = None, best: bool = False, framework: EngineName | None = None
) -> tuple[CheckpointFile, Checkpoint]:
    """Resolve a target to one checkpoint, read it, and verify every byte. All commands resolve targets here.

    Args:
        target: a run, a directory of checkpoints (its newest intact one), or a file. What is in a store is
            first copied into the cache.
        step: select this step of a run or directory.
        best: select the best checkpoint by the run's own metric.
        framework: of the arrays. Default: that of the newest checkpoint's engine, or else any installed one.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ConfigError: for ``step`` or ``best`` with a single file.
        MissingDependency: if no framework is installed.
        RemoteError: if a store fails.
    """
    if isinstance(target, Location):
        copy, url = fetch_checkpoint(target, step=step, best=best)
        file, checkpoint = read_checkpoint(copy, framework=framework)
        return file._replace(path=url), checkpoint
    resolve(target)  # a wrong name is reported before anything is imported
    if framework is None:
        framework = registry.first_installed(_engine_of_newest(target), purpose=f"reading {target}")
    if is_directory(target):
        return _manager(checkpoint_directory(target)).choose(step=step, best=best, framework=framework)
    if step is not None or best:
        flag = "--best" if step is None else f"--step {step}"
        raise ConfigError(f"{flag} goes with a run or a directory; {target} is one checkpoint")
    require_converted(read_header(target))
    return serialization.load(target, framework=framework)


def open_checkpoint(
    target: Target,
    *,
    step: int | None = None,
    best: bool = False,
    model: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Engine, CheckpointFile]:
    """Create an engine with the weights of a checkpoint.

    Args:
        target: a run, a directory of checkpoints (its newest intact one), or a file.
        step: select this step of a run or directory.
        best: select the best checkpoint by the run's own metric.
        model: where the base model is now, if it was moved: a folder or a hub name.
        changes: options that replace the run's, or the device, which is otherwise this machine's choice.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ModelError: if the base model cannot be loaded.
        ResumeRefused: if the base model is not the one of the run.
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
    """Like :func:`open_checkpoint`, for a checkpoint that :func:`read_checkpoint` returned."""
    changes = {"engine": _engine_for(checkpoint), **(changes or {})}
    config = replace(config_of(file, model=model), **changes)
    expected = fingerprint_of(file, "model")  # fails before the model is loaded, which may take minutes
    with base_model_errors(file, config.model, overridden=model is not None):
        engine = create_engine(config)
    if engine.fingerprint() != expected:  # an adapter on other weights computes nonsense silently
        raise ResumeRefused(f"{file.path}: was not trained on the weights of --model {config.model}")
    engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
    return engine


def config_of(file: CheckpointFile, *, model: str | None = None) -> TrainConfig:
    """Like :func:`recorded_config`, on any device, with the names of the modules that were adapted."""
    selection = RunRecord.from_header(file.header).environment.get("target_modules")
    tensors = [tensor.name.removeprefix("model.") for tensor in file.header.tensors]
    config = replace(recorded_config(file, model=model), device="auto")  # it may be another machine
    return as_trained(config, selection, tensors, where=str(file.path))


def recorded_config(file: CheckpointFile, *, model: str | None = None) -> TrainConfig:
    """What a checkpoint was trained with, and an engine that is installed; its machine's options are not.

    A model's folder that is not here becomes a path, which is never looked up on the hub: the hub would learn
    the name, and may have another model of that name.

    Raises:
        ConfigError: an option is invalid, in a checkpoint of another program.
        MissingDependency: no engine is installed.
    """
    record = RunRecord.from_header(file.header)
    config = record.train_config(where=str(file.path))
    if model is None and record.model_is_folder and hub_name(config.model) is not None:
        model = f"./{config.model}"
    engine = registry.first_installed(registry.recorded_engine(file), purpose=f"reading {file.path}")
    return replace(config, engine=engine, model=config.model if model is None else model)


def config_of_run(run: str | os.PathLike[str]) -> TrainConfig:
    """The config that resumes the run in a folder, which may have been moved.

    It is the run's config.toml. A run of an earlier version has none: then it is what the newest checkpoint
    records, without the options of the run's machine.

    Raises:
        CheckpointError: there is neither.
        ConfigError: an option is invalid, or it is no folder of a run.
    """
    folder = parse_target(run, "--resume")
    if isinstance(folder, Location):
        config = written_config(folder, flag="--resume")
        if config is None:
            raise ConfigError(f"--resume {folder}: has no {RUN_CONFIG}; give --out {folder}, and options")
        return replace(config, out=str(folder), mirror=None, branch=None, from_step=None)
    if not os.path.isfile(folder / RUN_CONFIG):
        checkpoints = folder.parent if os.path.isfile(folder) else folder
        if checkpoints.name == RUN_SUBDIRECTORY:
            raise ConfigError(f"--resume {run}: give the folder of the run: --resume {checkpoints.parent}")
        if os.path.isfile(folder):
            raise ConfigError(f"--resume {run}: is no run; to begin one: --from {run} --out NEW")
        return replace(recorded_config(newest(folder)), out=str(folder))
    config = from_toml(folder / RUN_CONFIG, flag="--resume")
    if not scan(folder / RUN_SUBDIRECTORY).files:  # it was killed before its first save: it begins again
        if config.schedule_steps == config.max_steps:  # by default; flags may change both
            config = replace(config, schedule_steps=None)
        if config.branch is not None:
            return replace(config, branch=str(folder))
    return replace(config, out=str(folder), branch=None, from_step=None)


def written_config(run: Target, *, flag: str) -> TrainConfig | None:
    """The config.toml of a run; None if it has none. It may be a stranger's."""
    if isinstance(run, Location):
        with fetch_files(run, RUN_CONFIG) as folder:
            return written_config(folder, flag=flag)
    return from_toml(run / RUN_CONFIG, flag=flag) if (run / RUN_CONFIG).is_file() else None


def fingerprint_of(file: CheckpointFile, content: Literal["model", "data"]) -> str:
    """Fingerprint of the base model or training data; ResumeRefused for another program's checkpoint."""
    record = RunRecord.from_header(file.header)
    if content in record.fingerprints:
        return record.fingerprints[content]
    unknown = "base model" if content == "model" else "data"
    if record.imported_from:
        raise ResumeRefused(
            f"{file.path}: is imported, and its {unknown} is unknown; resume it with `distrust train`: the "
            "checkpoints that it saves record both"
        )
    hint = ""
    if record.trained_by == "transformers":
        hint = "; `distrust convert --format trainer` makes a folder of transformers or peft from it"
    raise ResumeRefused(f"{file.path}: was not made by `distrust train`, so its {unknown} is unknown{hint}")


def base_model_errors(
    file: CheckpointFile, name: str, *, overridden: bool
) -> contextlib.AbstractContextManager[None]:
    """Context manager that explains the ModelError of a base model ``name`` that may have been moved.

    ``overridden`` says that the user has just given the name; then the error needs no explanation.
    """

    def explain(error: ModelError) -> ModelError:
        return ModelError(
            f"{file.path}: was trained on the model {name}, which cannot be loaded from here; give its "
            f"folder or hub name with --model ({error})"
        )

    return contextlib.nullcontext() if overridden else ErrorTranslator((ModelError,), explain)


def _engine_of_newest(target: Path) -> EngineName:
    files = scan(checkpoint_directory(target)).files if is_directory(target) else (read_header(target),)
    return registry.recorded_engine(files[-1]) if files else registry.default_engine()


def _engine_for(checkpoint: Checkpoint) -> EngineName:
    """The engine whose framework the arrays were loaded in."""
    array = next(iter(checkpoint.model.values()), None)
    return "mlx" if type(array).__module__.partition(".")[0] == "mlx" else "torch"


def _manager(directory: Path) -> CheckpointManager:
    """Manager of a run's checkpoints that selects the best one by the run's own metric."""
    files = scan(directory).files
    return CheckpointManager(directory, **RunRecord.from_header(files[-1].header).best_rules if files else {})

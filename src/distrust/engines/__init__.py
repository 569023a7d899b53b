"""The frameworks that can train, each behind the contract of ``training/engine.py``."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from distrust import config as options
from distrust.checkpoint import CheckpointFile, CheckpointManager
from distrust.checkpoint.store import newest
from distrust.config import TrainConfig, key
from distrust.engines.source import locate
from distrust.errors import ModelError, ResumeRefused
from distrust.training.engine import Engine, EngineState
from distrust.training.resume import FINGERPRINTS


def create(config: TrainConfig) -> Engine:
    """The engine that trains ``config``: model, tokenizer, adapter and optimizer, loaded.

    Raises:
        ModelError: if the model or tokenizer cannot be loaded.
        ConfigError: if an option does not fit the model or the machine.
    """
    locate(config.model)
    from distrust.engines.torch.engine import TorchEngine

    return TorchEngine(config)


def config_of(file: CheckpointFile) -> TrainConfig:
    """The config that a checkpoint was trained with.

    Raises:
        ConfigError: if the checkpoint was made by something else than this trainer.
    """
    known = {key(field.name) for field in fields(TrainConfig)}
    saved = {**file.header.run_info.get("extra", {}), **file.header.config}
    return options.from_mapping(
        {name: value for name, value in saved.items() if name in known}, where=str(file.path)
    )


def open_checkpoint(target: Path, *, model: str | None = None) -> tuple[Engine, CheckpointFile]:
    """An engine with the weights of a checkpoint.

    Args:
        target: a run, a directory of checkpoints, or a file; of several the newest.
        model: where the base model lies now, if it was moved.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        ModelError: if the base model cannot be loaded.
        ResumeRefused: if it is another base model.
    """
    file = newest(target)
    config = config_of(file)
    if model is not None:
        config = replace(config, model=model)
    expected = file.header.config.get(FINGERPRINTS, {}).get("model")
    if expected is None:
        raise ResumeRefused(f"{file.path}: was not made by `distrust train`, so its base model is not known")
    try:
        engine = create(config)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"{file.path}: was trained on the model {config.model}, which cannot be loaded from here; say "
            f"where it lies with --model ({error})"
        ) from error
    if engine.fingerprint() != expected:
        raise ResumeRefused(f"{file.path}: was not trained on the weights of --model {config.model}")
    checkpoint = CheckpointManager(file.path.parent).load(file.path, framework=engine.framework)
    engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
    return engine, file
